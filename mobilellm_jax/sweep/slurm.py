"""Submits the runs of a sweep to Slurm as job arrays, and keeps the scripts.

A file next to each script lists the names of its runs. Task i of the job array trains the run in
line i. Slurm sends SIGTERM two minutes before it ends a task early (--time, preemption). The task
then saves its run and puts itself back into the queue. `submit` refuses a sweep that still has a
job in the queue.
"""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mobilellm_jax.config import ConfigError
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.sweep.folder import SLURM
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import PACKAGE_PARENT

_log = logging.getLogger(__name__)
_JOBS = "jobs.json"  # File with the job ids of the last submission.

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=1-{count}{at_once}
#SBATCH --ntasks=1
#SBATCH --output={logs}/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
{extra}
# Task i trains the run in line i of the list.
run=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {list})
export PYTHONPATH={package}${{PYTHONPATH:+:$PYTHONPATH}}
{python} -m mobilellm_jax.sweep.child run {sweep} "$run" &
child=$!
trap 'kill -TERM $child' TERM
code=0
wait $child || code=$?
# A trapped signal ends the first wait; the second has the run's own code.
while kill -0 $child 2>/dev/null; do code=0; wait $child || code=$?; done
if [ $code -eq {requeue} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit $code
"""


def submit(sweep: Path, runs: Sequence[Run], arguments: str, at_once: int | None) -> None:
    """Writes the scripts of the job arrays and submits the scripts.

    A second array contains the runs with `tune_from`, and starts after the first array has ended.
    The folder must be on a file system that all nodes share. `arguments` are options of sbatch,
    such as "--partition=gpu --gres=gpu:1". At most `at_once` tasks of an array run at the same time
    (None: no limit).

    Raises:
      ConfigError: if this machine has no Slurm, if a job of this sweep is still in the queue, or if
        sbatch refuses the submission.
    """
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"--launcher=slurm needs {program}, and there is none on this machine; start it "
                "where Slurm's commands are, or use --launcher=local."
            )
    _check_queue(sweep)
    try:
        extra = shlex.split(arguments)
    except ValueError as error:
        raise ConfigError(f"--sbatch_args={arguments}: {error}.") from error
    wrong = [word for word in extra if not word.startswith("-") and "=" not in word]
    if wrong:
        raise ConfigError(f"--sbatch_args: {wrong[0]} must be written --name=value.")
    folder = sweep.resolve() / SLURM
    folder.mkdir(parents=True, exist_ok=True)
    first = [run for run in runs if not run.tune_from]
    then = [run for run in runs if run.tune_from]
    jobs: list[str] = []
    for part, ending in ((first, ""), (then, "-tuned")):
        if not part:
            continue
        name = re.sub(r"[^\w.-]", "_", sweep.resolve().name) + ending
        script = _write(folder, name, part, extra, at_once)
        options = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        command = ["sbatch", "--parsable", *options, str(script)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(f"{shlex.join(command)}: {result.stderr.strip()}")
        # sbatch --parsable prints "JOB" or "JOB;CLUSTER".
        jobs.append(result.stdout.strip().partition(";")[0])
        rundir.write_whole(folder / _JOBS, json.dumps({"jobs": jobs}) + "\n")
        _log.info(f"submitted {counted(len(part), 'run')} as job {jobs[-1]}: {script}")


def _write(
    folder: Path, name: str, runs: Sequence[Run], extra: Sequence[str], at_once: int | None
) -> Path:
    script = folder / f"array-{len(list(folder.glob('*.sh'))) + 1}.sh"
    names = script.with_suffix(".txt")
    rundir.write_whole(names, "".join(f"{run.name}\n" for run in runs))
    text = _SCRIPT.format(
        name=name,
        count=len(runs),
        at_once=f"%{at_once}" if at_once else "",
        logs=folder,
        extra="".join(f"#SBATCH {word}\n" for word in extra),
        list=shlex.quote(str(names)),
        package=shlex.quote(PACKAGE_PARENT),
        python=shlex.quote(sys.executable),
        sweep=shlex.quote(str(folder.parent)),
        requeue=SAVED_REQUEUE_ME,
    )
    rundir.write_whole(script, text)
    return script


def _check_queue(sweep: Path) -> None:
    file = sweep / SLURM / _JOBS
    if not file.exists():
        return
    for job in strict_json.get(strict_json.read(file), "jobs", list[str], name=str(file)):
        command = ["squeue", "--noheader", f"--jobs={job}"]
        result = subprocess.run(command, capture_output=True, text=True)
        # squeue exits with an error for a job that ended long ago.
        if result.returncode == 0 and result.stdout.strip():
            raise ConfigError(
                f"job {job} of this sweep is still in Slurm's queue; wait for it, or cancel it "
                f"with `scancel {job}` and start again. Saved runs then continue."
            )
