"""Finds the launcher of this process: flags, Slurm, Kubernetes, a TPU or Open MPI."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping

import jax

from mobilellm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The launcher that started this process, and what it says about the run's processes."""

    name: str
    several: bool  # Whether jax must connect several processes.
    devices: list[int] | None = None  # GPUs of this process; None = jax chooses.


def check_flags(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int]:
    """Returns the three flags; raises a `ConfigError` if a flag is missing or wrong."""
    if coordinator_address is None or num_processes is None or process_id is None:
        values = {
            "--coordinator_address": coordinator_address,
            "--num_processes": num_processes,
            "--process_id": process_id,
        }
        missing = [flag for flag, value in values.items() if value is None]
        given = ", ".join(f"{flag}={value}" for flag, value in values.items() if value is not None)
        raise ConfigError(
            f"{given} without {' and '.join(missing)}; give all three, or none to let Slurm, "
            "Kubernetes or the metadata of the TPU tell them."
        )
    if not re.fullmatch(r"[^\s/]+:\d+", coordinator_address):
        raise ConfigError(
            f"--coordinator_address={coordinator_address} must be HOST:PORT of process 0, such as "
            "node1:8476."
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id={process_id} must be at least 0 and less than "
            f"--num_processes={num_processes}; number the processes from 0."
        )
    return coordinator_address, num_processes, process_id


def find_cluster(env: Mapping[str, str]) -> Cluster:
    """Returns the launcher of this process; checks the launchers in the same order as jax.

    jax uses a launcher as soon as the launcher's environment variables exist. These variables also
    exist in the Kubernetes pod of a notebook and in a Slurm shell, where no other process runs, and
    jax fails there. This function also requires that the launcher has started several processes.

    Raises:
      ConfigError: if there are several processes, but jax cannot connect them.
    """
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise ConfigError(
                f"this is one of {env['OMPI_COMM_WORLD_SIZE']} processes that Open MPI started, "
                "and jax cannot read the variables of this version of Open MPI; give "
                "--coordinator_address=HOST:PORT "
                "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK, or "
                "--num_processes=1 if every process is a separate run."
            )
        return Cluster("Open MPI", several=True)
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
        return Cluster(f"Slurm (job {env.get('SLURM_JOB_ID')})", True, _slurm_gpus(env))
    # On a machine with TPU chips and libtpu, importing jax adds "tpu" to this setting.
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]  # added late
    if "tpu" in (platforms or "").split(","):
        hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
        if hosts is None:
            return Cluster("TPU metadata", several=True)
        slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
        if slices == 1 and "," not in hosts:
            return Cluster("a single TPU host", several=False)
        return Cluster("TPU variables", several=True)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "this is a pod of an Indexed Job, and finding the other pods needs the package "
                "`kubernetes` (pip install 'jax[k8s]'); or give --coordinator_address, "
                "--num_processes and --process_id, or --num_processes=1 if there are no others."
            )
        return Cluster("Kubernetes", several=True)
    return Cluster("no cluster found", several=False)


def _slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of this task, as indices into `CUDA_VISIBLE_DEVICES`.

    jax uses one GPU per task: the GPU whose number is the number of the task on its node. With one
    task per node, seven of eight GPUs then stay idle. If Slurm shows each task only its own GPUs,
    the task may have no GPU of this number.
    """
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible:
        return None
    gpus, tasks = len(visible), _slurm_tasks_here(env)
    bound = gpus < tasks or gpus < int(env.get("SLURM_GPUS_ON_NODE", gpus))
    if bound:
        return list(range(gpus))
    share, own = gpus // tasks, int(env["SLURM_LOCALID"])
    return list(range(own * share, (own + 1) * share))


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Returns the number of tasks on this node; "2(x3),1" stands for 2, 2, 2 and 1 tasks."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", 0)), len(counts) - 1)]
