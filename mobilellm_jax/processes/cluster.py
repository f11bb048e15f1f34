"""Whether this process is one of several, as Slurm, Kubernetes, a TPU or Open MPI says."""

import dataclasses
import importlib.util
from collections.abc import Mapping

import jax

from mobilellm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the environment says about the run's processes."""

    name: str
    several: bool
    devices: list[int] | None = None  # GPUs of this process; None = what jax finds


def find_cluster(env: Mapping[str, str]) -> Cluster:
    """Returns where this process runs, in the order in which jax looks.

    jax knows how to ask each of these places for the address of process 0 and the rest. Left alone
    it would ask any that looks present, and fail in a notebook's pod or in a shell that Slurm gave;
    here a place counts only where it started several processes.

    Raises:
      ConfigError: for several processes that jax cannot bring together.
    """
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise ConfigError(
                f"this is one of {env['OMPI_COMM_WORLD_SIZE']} processes of an Open MPI whose "
                "variables jax cannot read; give --coordinator_address=HOST:PORT "
                "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK, or "
                "--num_processes=1 if each is a run of its own."
            )
        return Cluster("Open MPI", several=True)
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
        return Cluster(f"Slurm (job {env.get('SLURM_JOB_ID')})", True, _slurm_gpus(env))
    # jax puts "tpu" there when it is imported on a machine with TPU chips and libtpu.
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]  # added late
    if "tpu" in (platforms or "").split(","):
        hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
        if hosts is None:
            return Cluster("TPU metadata", several=True)
        slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
        if slices == 1 and "," not in hosts:
            return Cluster("a TPU host of its own", several=False)
        return Cluster("TPU variables", several=True)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "this is a pod of an Indexed Job, and asking Kubernetes for the other pods takes "
                "the package `kubernetes` (pip install 'jax[k8s]'); or give --coordinator_address, "
                "--num_processes and --process_id, or --num_processes=1 if there are no others."
            )
        return Cluster("Kubernetes", several=True)
    return Cluster("no cluster found", several=False)


def _slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of this task, as numbers among those that it sees.

    jax takes one GPU per task, the one with the task's number on its node. That leaves seven of
    eight idle with one task per node, and fails where Slurm shows every task its own GPUs only.
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
    """Reads "2(x3),1": three nodes with two tasks, one with one."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", 0)), len(counts) - 1)]
