"""Writes the messages of process 0 at the start and end of training, and after bad steps."""

import logging
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from mobilellm_jax.config import Config, changed_fields
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.model.size import FLOP_CONVENTION, flops_per_token, parameter_count
from mobilellm_jax.processes import distributed
from mobilellm_jax.quantize.schemes import trained_scheme
from mobilellm_jax.sharding import bytes_per_device, count_slices
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.metrics import read_metrics
from mobilellm_jax.train.optimizer import learning_rate
from mobilellm_jax.train.state import TrainState

_log = logging.getLogger(__name__)


def start(
    config: Config, mixture: Mixture, mesh: Mesh, state: TrainState, resume_step: int | None
) -> None:
    """Logs the model, data, batch, mesh and memory of the run that starts."""
    if not distributed.is_first():
        return
    model, train = config.model, config.train
    sharing = f" x {model.num_repeats} ({model.sharing})" if model.num_repeats > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    slices = _describe_slices(config, mesh)
    lines = [
        f"model   {parameter_count(model):,} parameters, {model.num_blocks} blocks{sharing}, "
        f"width {model.embed_dim}, {model.num_heads} heads over {model.num_kv_heads}",
        f"compute {model.compute_dtype}, attention {model.attention}, remat {model.remat}, "
        f"{flops_per_token(model, config.data.seq_len) / 1e6:,.1f} MFLOP per token "
        f"({FLOP_CONVENTION})",
        *_describe_data(config, mixture),
        f"batch   {train.global_batch} x {config.data.seq_len} = {config.tokens_per_step:,} "
        f"tokens, {train.steps:,} steps",
        f"mesh    {axes} over {jax.device_count()} x {jax.devices()[0].device_kind}{slices}",
        f"state   {bytes_per_device(state.params) / 1e6:,.1f} MB of parameters and "
        f"{bytes_per_device(state.optimizer) / 1e6:,.1f} MB of optimizer state on each device",
    ]
    scheme = trained_scheme(config)
    if scheme is not None:
        lines.append(f"quantize trained for {scheme}")
    if resume_step is not None:
        lines.append(f"resume  from step {resume_step:,}")
    _log.info("\n".join(lines))


def _describe_data(config: Config, mixture: Mixture) -> list[str]:
    crosses = "attention crosses document borders"
    apart = "attention and positions stay within a document"
    boundaries = config.data.boundaries
    lines = [
        f"data    {mixture.path}, fingerprint {mixture.fingerprint[:12]}",
        f"        boundaries {boundaries}: {crosses if boundaries == 'concat' else apart}",
    ]
    for component in mixture.components:
        counts, stream = component.counts(TRAIN), component.stream(TRAIN)
        line = f"        {counts.tokens:,} tokens of {counts.documents:,} documents"
        if len(mixture.components) > 1:
            line += f" of {component.name}, {float(component.share):.2%} of the samples"
        line += f", {float(config.tokens * component.share / counts.tokens):.2f} epochs"
        if stream and stream.has_loss_mask:
            line += ", a loss mask on them"
        if not component.stream(VALIDATION):
            line += ", nothing held out"
        lines.append(line)
    return lines


def _describe_slices(config: Config, mesh: Mesh) -> str:
    slices, dcn_data = count_slices(mesh.devices.flat), config.mesh.dcn_data
    if dcn_data > 1:
        return f", {dcn_data} slices along data over DCN"
    if slices > 1:
        return f", which come in {slices} slices (see mesh.dcn_data)"
    return ""


def changed_rate(before: Config, config: Config, updates: int) -> None:
    """Logs the old and the new learning rate of a resumed run if they differ.

    `updates` is the number of updates so far.
    """
    old, new = (
        float(learning_rate(each.optimizer, each.train.steps)(updates)) for each in (before, config)
    )
    if not distributed.is_first() or math.isclose(old, new, rel_tol=1e-6):
        return
    schedule = {"train.steps", *(f"optimizer.{name}" for name in vars(config.optimizer))}
    changes = ", ".join(
        f"{name}={theirs} to {ours}"
        for name, (theirs, ours) in changed_fields(before, config).items()
        if name in schedule
    )
    text = f"rate    the learning rate changes from {old:.4g} to {new:.4g} here ({changes})"
    if not new > old > 0:
        _log.info(text)
        return
    kept = config.optimizer.peak_lr * old / new
    _log.warning(
        f"{text}. A rise may undo some of the training. To go on with {old:.4g}, add "
        f"--change_learning_rate --config.optimizer.peak_lr={kept:.4g}."
    )


def going_back(bad: range, good_step: int) -> None:
    """Warns that steps were not finite and that the run returns to an earlier checkpoint."""
    if distributed.is_first():
        _log.warning(
            f"GOING BACK to the checkpoint of step {good_step}: loss, gradient or update was not "
            f"finite in {_steps(bad)}. If the state was damaged, that heals it. If this happens "
            "again, the run ends."
        )


def divergence(config: Config, workdir: Path, bad: range, good_step: int | None) -> str:
    """Returns a message about bad steps and commands that show and repeat the first bad batch."""
    data, batch = config.data, config.train.global_batch
    inspect = [
        *("mobilellm", "inspect", f"--data={data.path}", f"--seq_len={data.seq_len}"),
        *(f"--boundaries={data.boundaries}", f"--seed={data.seed}"),
        *(f"--first_sample={(bad[0] - 1) * batch}", f"--sample={batch}"),
    ]
    again = "there is no checkpoint before them to go back to"
    if good_step is not None:
        again = f"they were so again after going back to the checkpoint of step {good_step}"
    if bad[0] == 1:
        remedy = (
            "The first step was not finite, so the learning rate is not the cause. If the data is "
            "right, the initial parameters are wrong "
            f"(train.init_from={config.train.init_from!r}, model.init_std={config.model.init_std})."
        )
    else:
        remedy = (
            "If the data is right, lower "
            f"optimizer.peak_lr={config.optimizer.peak_lr} in another --workdir that starts from a "
            "checkpoint with --config.train.init_from."
        )
    return (
        f"loss, gradient or update was not finite in {_steps(bad)} "
        f"(train.max_bad_steps={config.train.max_bad_steps}), and {again}.\n"
        f"The first of these batches is shown by\n  {shlex.join(inspect)}\n"
        f"and met again by the same train command, which goes on from step {good_step or 0} of "
        f"{workdir}.\n"
        f"{remedy}"
    )


def _steps(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def end(workdir: Path, finished: bool, failed: Mapping[str, str]) -> None:
    """Logs the result of the run, and the commands that the user may run next.

    `failed` has the last error of each side record that failed.
    """
    if not distributed.is_first():
        return
    records = read_metrics(workdir / rundir.METRICS)
    measured = [r for r in records if "validation/loss" in r]
    lines = [f"{'Finished' if finished else 'Stopped, saved'}: {workdir}"]
    if measured:
        first, last = measured[0], measured[-1]
        for key, name, unit in (
            ("validation/bpb", "bits per byte", ""),
            ("validation/loss", "loss", " (nats per token)"),
        ):
            if key in first and key in last:
                path = f"{first[key]:.3f} at step {first['step']}"
                if len(measured) > 1:
                    path += f" -> {last[key]:.3f} at step {last['step']}"
                lines.append(f"  validation {name + ':':14} {path}{unit}")
    lines += [f"  failed: {what} ({why})" for what, why in failed.items()]
    board = workdir / rundir.TENSORBOARD
    lines.append(f"  curves: {workdir / rundir.LOSS_PLOT}, tensorboard --logdir={board}")
    if finished:
        lines += [
            f"  next:   mobilellm generate --checkpoint={workdir} --prompt='...'",
            f"          mobilellm export --checkpoint={workdir} --format=hf --output=DIR",
        ]
    else:
        lines.append("  next:   the same command again goes on")
    _log.info("\n".join(lines))
