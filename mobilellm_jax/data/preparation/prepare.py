"""Turns sources into token shards in any number of processes, with bounded memory.

The processes of `workers.py`, or Beam, encode each piece of a source into a part (`parts.py`).
`assembly.py` joins the parts into shards. The position of a document in the shards does not depend
on the workers, so equal sources and settings give equal bytes for any number of workers.

`prepare` works in the folder `.NAME.preparing`. This folder is in the output if the output exists,
and next to it otherwise. At the end, `prepare` moves the complete output out of this folder. If
`prepare` is killed, the folder stays, and the next run uses the parts in it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.data import shards
from mobilellm_jax.data.preparation import assembly, beam_runner
from mobilellm_jax.data.preparation.held_out import (
    choose_held_out,
    is_divided,
    tokenizer_sample,
)
from mobilellm_jax.data.preparation.parts import Job, Part, Task, read_part
from mobilellm_jax.data.preparation.settings import (
    BadLinePolicy,
    Runner,
    check_choices,
    check_settings,
)
from mobilellm_jax.data.preparation.source_files import changed_files
from mobilellm_jax.data.preparation.workers import encode_pieces
from mobilellm_jax.data.preparation.working_folder import settings_difference, working_folder
from mobilellm_jax.data.shards import Counts, Manifest, SourceRecord, Split
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION, BadLine, Source, stop
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer, load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import (
    Convention,
    Tokenizer,
    changes_text,
    document_start,
)
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.startup.cpu import available_cores
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.outputs import give_name, is_empty, real_folder

SHARD_TOKENS = 64_000_000
# With more bad lines than this, a source probably does not have the format that the user named.
MOST_BAD_LINES = 10_000
# The size of two pieces. A second process would take longer to start than one process takes to
# encode smaller sources.
_TOO_SMALL_TO_SHARE_BYTES = 16_000_000
# A validation share that differs by more than this factor from the wanted share is worth a warning.
_FAR_OFF = 3
_log = logging.getLogger(__name__)


def prepare(
    sources: Sequence[str],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    validation_fraction: float = 0.01,
    on_bad_line: BadLinePolicy = "stop",
    workers: int | None = None,
    runner: Runner = "local",
    beam_options: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Encodes the documents of `sources`, in this order, and writes token shards to `output`.

    `tokenizer` is an existing tokenizer file. If `vocab_size` is given instead, `prepare` trains a
    tokenizer of this size on the training documents. In sources without a validation split, a hash
    of each document's content selects about `validation_fraction` of the documents for validation.
    If `weights` are given, training takes samples from the sources in these proportions. If
    `runner` is "beam", `output` must be on a disk that all workers share.

    The folder `output` appears only when it is complete. If `output` is already complete and was
    made with equal settings, it stays unchanged.

    Raises:
      UserError: if a setting is invalid, the sources have no text, a document is refused, or
        `output` contains other data.
      MissingFileError: if the tokenizer file is missing, or a pattern matches nothing.
    """
    check_settings(sources, weights, tokenizer, vocab_size, validation_fraction, workers)
    check_choices(on_bad_line, runner)
    given = load_tokenizer(tokenizer) if tokenizer else None
    final = real_folder("--output", output)
    work = (final if final.exists() else final.parent) / f".{final.name}.preparing"
    opened = [open_source(spec, work / "sources" / str(i)) for i, spec in enumerate(sources)]
    settings = {
        "sources": [source.identity() for source in opened],
        "weights": list(weights) if weights else None,
        "tokenizer": f"SHA-256 {given.sha256}" if given else f"trained, {vocab_size} tokens",
        "validation_fraction": validation_fraction,
        "on_bad_line": on_bad_line,
        "shard_tokens": shard_tokens,
    }
    if made := _complete_output(output, settings, opened):
        shutil.rmtree(work, ignore_errors=True)  # An earlier run was killed before it did this.
        return made
    with working_folder(work, settings, opened):
        preparation = _Preparation(work, opened, weights, settings)
        job, tasks = preparation.plan(given, vocab_size)
        if runner == "beam":
            parts = beam_runner.encode_and_assemble(job, tasks, beam_options)
        else:
            parts = _encode(job, tasks, workers)
        manifest = preparation.finish(job, parts)
        give_name(work / "output", final)
        shutil.rmtree(work)
    _log_summary(output, manifest)
    _check_share(opened, manifest)
    return manifest


@dataclasses.dataclass
class _Preparation:
    work: Path
    sources: Sequence[Source]
    weights: Sequence[float] | None
    settings: Mapping[str, Any]

    def plan(self, given: Tokenizer | None, vocab_size: int | None) -> tuple[Job, list[Task]]:
        """Returns the job and the ordered tasks; puts the tokenizer into the output.

        With equal settings and sources, every run returns the same job and tasks. If an earlier run
        trained a tokenizer, this run uses that tokenizer.
        """
        skip_bad_lines = self.settings["on_bad_line"] == "skip"
        on_bad: Callable[[BadLine], None] = (lambda _: None) if skip_bad_lines else stop
        held_out = choose_held_out(self.sources, self.settings["validation_fraction"], on_bad)
        if held_out.cut is not None:
            _log.info(
                "The sources have too few documents to hold out whole ones, so the last "
                f"{held_out.cut.share:.1%} of a document is the validation text."
            )
        output = self.work / "output"
        if given is not None:
            copy = copy_tokenizer(given, output, _for_documents(given))
            if changes_text(given):
                _log.info(f"{given.file} normalises text, so decoding will not restore it exactly.")
        else:
            assert vocab_size is not None, "checked before"
            copy = output / rundir.SENTENCEPIECE_MODEL
            if not copy.is_file():
                _log.info(f"Training a tokenizer of {vocab_size:,} tokens.")
                texts = tokenizer_sample(self.sources, self.weights, held_out, on_bad)
                train_tokenizer(texts, vocab_size, copy)
        tasks: list[Task] = []
        for index, source in enumerate(self.sources):
            below = held_out.below if is_divided(source) else 0
            for split in source.splits():
                for piece in source.pieces(split):
                    tasks.append(Task(len(tasks), index, below, piece))
        self._check_pieces(tasks)
        job = Job(
            sources=tuple(source.spec for source in self.sources),
            work=self.work,
            tokenizer=copy,
            dtype=shards.token_dtype(load_tokenizer(copy).vocab_size),
            skip_bad_lines=skip_bad_lines,
            shard_tokens=self.settings["shard_tokens"],
            cut=held_out.cut,
        )
        return job, tasks

    def _check_pieces(self, tasks: Sequence[Task]) -> None:
        """Checks that an earlier `prepare` had the same pieces, so that its parts can be used."""
        file = self.work / "pieces.sha256"
        found = hashlib.sha256(repr(tasks).encode()).hexdigest()
        if not file.is_file():
            rundir.write_whole(file, found)
        elif file.read_text("utf-8") != found:
            raise UserError(
                f"{self.work} holds an interrupted preparation that divided the sources in another "
                "way, perhaps by another version of mobilellm; delete it to begin anew."
            )

    def finish(self, job: Job, parts: Generator[Part, None, None]) -> Manifest:
        """Joins each part into shards when the part arrives, then writes the manifest."""
        weights: Sequence[float | None] = self.weights or [None] * len(self.sources)
        totals = [
            SourceRecord(
                spec=source.spec, weight=weight, splits={}, empty_documents=0, bad_lines=()
            )
            for source, weight in zip(self.sources, weights, strict=True)
        ]
        planners = {split: assembly.Planner(job, split) for split in (TRAIN, VALIDATION)}
        without_target: collections.Counter[str] = collections.Counter()
        with contextlib.closing(parts):
            for part in parts:
                totals[part.source] = _added(totals[part.source], part)
                without_target.update(part.without_target)
                if sum(len(total.bad_lines) for total in totals) > MOST_BAD_LINES:
                    raise UserError(
                        f"source={self.sources[part.source].spec!r}: more than {MOST_BAD_LINES:,} "
                        "bad lines, so this is not a damaged line here and there. The last: "
                        f"{part.bad_lines[-1]}. Check the form of the source."
                    )
                for planner in planners.values():
                    planner.made += [assembly.assemble(job, plan) for plan in planner.add(part)]
                    planner.delete_used_parts()
        splits = {}
        for name, planner in planners.items():
            planner.made += [assembly.assemble(job, plan) for plan in planner.end()]
            counts = sum((total.splits.get(name, Counts()) for total in totals), Counts())
            if counts.documents:
                named = assembly.give_final_names(job, self.work / "output", name, planner.made)
                splits[name] = Split(**dataclasses.asdict(counts), shards=tuple(named))
        if TRAIN not in splits:
            raise UserError(
                f"source={', '.join(source.spec for source in self.sources)}: no document with "
                "text for training; check the pattern and --validation_fraction."
            )
        self._check_targets(splits, without_target)
        for total in totals:
            if total.weight is not None and total.splits.get(TRAIN, Counts()).tokens < 2:
                raise UserError(
                    f"source={total.spec!r} has a weight but no text for training; leave it out, "
                    "or check its pattern."
                )
        tokenizer = load_tokenizer(job.tokenizer)
        manifest = Manifest(
            format_version=shards.FORMAT_VERSION,
            tokenizer=tokenizer.file.name,
            tokenizer_sha256=hashlib.sha256(tokenizer.file.read_bytes()).hexdigest(),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            document_start=document_start(tokenizer),
            dtype=job.dtype.name,
            splits=splits,
            sources=tuple(totals),
            settings=self.settings,
        )
        shards.write_manifest(self.work / "output", manifest)
        return manifest

    def _check_targets(
        self, splits: Mapping[str, Split], without_target: Mapping[str, int]
    ) -> None:
        """Warns about documents without a target; refuses training data of only such documents.

        Raises:
          UserError: if no training document has a target; the parts are deleted.
        """
        if without_target[TRAIN] == splits[TRAIN].documents:
            for name in ("parts", "shards", "output"):  # The next run could not use them.
                shutil.rmtree(self.work / name)
            raise UserError(
                f"No token of the {without_target[TRAIN]:,} training documents is a target: every "
                "loss_mask is 0 everywhere, so training could learn nothing. Put a 1 into "
                '"loss_mask" for each token to learn, or leave the field out to learn all tokens.'
            )
        for name, split in splits.items():
            if count := without_target[name]:
                _log.warning(
                    f"WARNING: {name}: {count:,} of {split.documents:,} documents have no target, "
                    'because their "loss_mask" is 0 everywhere.'
                )


def _encode(job: Job, tasks: Sequence[Task], workers: int | None) -> Generator[Part, None, None]:
    """Yields all parts in order: the parts of earlier runs, and those that this run encodes."""
    done = {t.number: p for t in tasks if (p := read_part(job.parts, t.number)) is not None}
    left = [task for task in tasks if task.number not in done]
    left_bytes = sum(task.piece.size_bytes for task in left)
    done_bytes = sum(task.piece.size_bytes for task in tasks) - left_bytes
    if done:
        _log.info(f"Going on: {len(done):,} of {len(tasks):,} parts are complete.")
    count = workers or available_cores()
    if left_bytes < _TOO_SMALL_TO_SHARE_BYTES and workers is None:
        count = 1
    encoded = encode_pieces(job, left, min(count, max(len(left), 1)), done_bytes)
    with contextlib.closing(encoded):
        for task in tasks:
            yield done.pop(task.number) if task.number in done else next(encoded)


def _added(total: SourceRecord, part: Part) -> SourceRecord:
    splits = {name: total.splits.get(name, Counts()) + split for name, split in part.splits.items()}
    return dataclasses.replace(
        total,
        splits={name: counts for name, counts in splits.items() if counts.documents},
        empty_documents=total.empty_documents + part.empty_documents,
        bad_lines=(*total.bad_lines, *part.bad_lines),
    )


def _check_share(sources: Sequence[Source], manifest: Manifest) -> None:
    """Warns if the validation text is far more or far less than the user asked for."""
    asked = manifest.settings["validation_fraction"]
    sizes = dict.fromkeys((TRAIN, VALIDATION), 0)
    for source, record in zip(sources, manifest.sources, strict=True):
        if is_divided(source):
            for split in sizes:
                sizes[split] += record.splits.get(split, Counts()).text_bytes
    share = sizes[VALIDATION] / max(1, sum(sizes.values()))
    if share and not asked / _FAR_OFF <= share <= asked * _FAR_OFF:
        _log.warning(
            f"WARNING: the validation text is {share:.1%} of the text, not {asked:.1%} as "
            "--validation_fraction asks, because the documents are few or of different lengths. "
            "Give more or shorter documents, or another --validation_fraction."
        )


def _log_summary(output: Path, manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        _log.info(
            f"{name}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} "
            f"tokens ({split.text_bytes / split.tokens:.2f} bytes per token)."
        )
    if skipped := sum(len(source.bad_lines) for source in manifest.sources):
        _log.warning(
            f"WARNING: {skipped:,} bad lines were left out; {output / shards.MANIFEST} lists them."
        )


def _for_documents(tokenizer: Tokenizer) -> Convention:
    """Returns the tokenizer's convention; a model of these documents writes EOS at their ends."""
    convention = tokenizer.convention
    ends = dict.fromkeys([*convention.end_ids, tokenizer.eos_id])
    return dataclasses.replace(convention, end_ids=tuple(ends))


def _complete_output(
    output: Path, settings: Mapping[str, Any], sources: Sequence[Source]
) -> Manifest | None:
    """Returns the manifest of a complete `output`, or None if `output` is missing or empty."""
    if is_empty(output):
        return None
    if not (output / shards.MANIFEST).is_file():
        raise UserError(
            f"output={str(output)!r} exists, but is not a folder of token shards (it has no "
            f"{shards.MANIFEST}); name another folder or delete it."
        )
    manifest = shards.open_tokens(output).manifest
    changed = changed_files(output, sources)
    if differing := settings_difference(manifest.settings, settings, changed):
        raise UserError(
            f"output={str(output)!r} holds data made with other settings ({differing}); "
            "name another folder or delete it."
        )
    _log.info(f"{output} is complete already, made with the same settings; nothing to do.")
    return manifest
