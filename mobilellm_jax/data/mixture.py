"""The data of a training run: one token folder, or several components in exact proportions.

`data.path` names a folder that `prepare` wrote, or a mixture such as `DIR:0.7,DIR:0.3`. A folder
whose sources were prepared with weights is itself a mixture of these sources. If such a folder is
in a mixture of folders, the share of a source in the samples is the share of its folder times the
share of the source within the folder.

The order of samples is computed from the sample index, without state. The weights are exact
fractions, so there is a smallest block of D samples that contains an integer number n_c of samples
of each component c. Sample i has position i mod D in block i // D. Each block has its own
permutation of the positions. The permuted position determines the component of the sample and the
number of the sample within the component. Every block has exactly the requested proportions, and
each component has its own epochs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ConfigError
from mobilellm_jax.data.permutation import permuted
from mobilellm_jax.data.shards import Counts, Dataset, open_tokens
from mobilellm_jax.data.token_stream import TokenStream

MAX_BLOCK = 100_000
# A decimal number with at most two digits in the exponent. An exact fraction with a larger
# exponent, such as 1e999999999, would fill the memory.
_DECIMAL = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,2})?")
# `permuted` takes this number as its argument `stream` to order blocks. To order the windows of
# component c, it takes c.
_BLOCKS = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A folder, or one source of a folder; `share` is the fraction of samples that come from it."""

    name: str
    share: Fraction
    dataset: Dataset
    source: int | None  # Index of the source, or None for the folder.

    def stream(self, split: str) -> TokenStream | None:
        """Returns the component's tokens in a split, or None if there is no token to predict."""
        whole = self.dataset.splits.get(split)
        if whole is None:
            return None
        stream = whole if self.source is None else self.dataset.source_stream(split, self.source)
        return stream if stream.tokens >= 2 else None

    def counts(self, split: str) -> Counts:
        """Returns the numbers of documents, tokens and bytes of text in a split."""
        manifest = self.dataset.manifest
        splits = manifest.splits if self.source is None else manifest.sources[self.source].splits
        return splits.get(split, Counts())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Components whose shares add up to 1; `path` is the value of `data.path`."""

    path: str
    components: tuple[Component, ...]

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All folders of the mixture in order, without repetitions."""
        return tuple({c.dataset.path: c.dataset for c in self.components}.values())

    @property
    def tokenizer(self) -> Path:
        """The tokenizer file, which is the same in every folder."""
        return self.components[0].dataset.tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the data and the shares, which does not depend on the folders' paths."""
        if len(self.components) == 1:
            return self.components[0].dataset.fingerprint
        parts = [[c.dataset.fingerprint, c.source, str(c.share)] for c in self.components]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def block_counts(self) -> NDArray[np.int64]:
        """Number of samples of each component in a block."""
        size = math.lcm(*(c.share.denominator for c in self.components))
        return np.array([int(c.share * size) for c in self.components], np.int64)

    def alone(self, component: Component) -> "Mixture":
        """Returns the mixture of one component only."""
        return Mixture(
            path=self.path, components=(dataclasses.replace(component, share=Fraction(1)),)
        )

    def place(
        self, sample_B: NDArray[np.int64], seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the component of each global sample, and the sample's number in the component."""
        ends = np.cumsum(self.block_counts)
        block_B, place_B = np.divmod(sample_B, ends[-1])
        place_B = permuted(place_B, int(ends[-1]), seed, block_B, _BLOCKS)
        component_B = np.searchsorted(ends, place_B, side="right")
        count_B, end_B = self.block_counts[component_B], ends[component_B]
        return component_B, block_B * count_B + place_B - (end_B - count_B)


def mixture_of(dataset: Dataset) -> Mixture:
    """Returns the mixture of a folder's sources.

    If the sources have no weights, the whole folder is the only component.
    """
    return _mixture(str(dataset.path), [(dataset, Fraction(1))])


def open_mixture(path: str) -> Mixture:
    """Opens the folder or the folders that `data.path` names.

    Raises:
      ConfigError: if a weight is invalid, tokenizers differ, or a block would be too long.
      MissingFileError: if a folder or file is missing.
      UserError: if a folder is damaged.
    """
    folders = split_path(path)
    opened = [(open_tokens(folder), weight) for folder, weight in folders]
    first = opened[0][0]
    for other, _ in opened[1:]:
        ours, theirs = first.manifest.tokenizer_sha256, other.manifest.tokenizer_sha256
        if ours != theirs:
            raise ConfigError(
                f"data.path={path!r}: {first.path} was made with the tokenizer {first.tokenizer} "
                f"(SHA-256 {ours[:12]}) and {other.path} with {other.tokenizer} ({theirs[:12]}), "
                "but all folders of a mixture must have the same tokenizer; prepare one of them "
                "again with --tokenizer=FILE of the other."
            )
        if first.manifest.encoding != other.manifest.encoding:
            raise ConfigError(
                f"data.path={path!r}: {first.path} and {other.path} hold other tokens before or "
                "after their documents, or the same tokenizer.json with other tokens added: "
                f"{_framing(first)} and {_framing(other)}. Prepare one of them again with "
                "--tokenizer=FOLDER of the other."
            )
    return _mixture(path, opened)


def _framing(dataset: Dataset) -> str:
    manifest = dataset.manifest
    start = " ".join(map(str, manifest.start)) or "none"
    return f"{manifest.vocab_size} ids, {start} before and {manifest.eos_id} after a document"


def split_path(path: str) -> list[tuple[Path, Fraction]]:
    """Returns the folders and the weights that a `data.path` names.

    If `path` is the path of an existing folder, the result is this folder, even if the path
    contains commas or colons. In a mixture, the weight of a folder follows the last colon, and a
    folder's path cannot contain a comma.

    Raises:
      ConfigError: if a weight is missing or bad, or a folder is named twice.
    """
    if not is_mixture(path) or _folder(path).is_dir():
        return [(_folder(path), Fraction(1))]
    folders = [_weighted(path, item) for item in path.split(",")]
    for folder, count in Counter(folder for folder, _ in folders).items():
        if count > 1:
            raise ConfigError(
                f"data.path={path!r} names {folder} {count} times; name it once, with the sum of "
                "the weights."
            )
    return folders


def is_mixture(path: str) -> bool:
    """Returns whether `path` has the form of a mixture; does not check if `path` is a folder."""
    return "," in path or _weight(path.rpartition(":")[2]) is not None


def _weighted(path: str, item: str) -> tuple[Path, Fraction]:
    folder, _, text = item.strip().rpartition(":")
    weight = _weight(text)
    if not folder or weight is None or weight <= 0:
        raise ConfigError(
            f"data.path={path!r}: {item!r} must be a folder and its weight, a decimal number "
            "greater than 0, for example data/web:0.7. (A folder with a comma in its name cannot "
            "be part of a mixture; make a link with another name.)"
        )
    return _folder(folder), weight


def _folder(text: str) -> Path:
    # The record of an old run may contain `~user`. If this system does not know the user,
    # `expanduser` does not change the path, and the folder is later reported as missing.
    return Path(os.path.expanduser(text))


def _weight(text: str) -> Fraction | None:
    """Returns the exact value of a decimal number (0.1 + 0.2 is 0.3), or None for another text."""
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def _mixture(path: str, folders: Sequence[tuple[Dataset, Fraction]]) -> Mixture:
    total = sum(weight for _, weight in folders)
    components = list(
        itertools.chain.from_iterable(_parts(dataset, w / total) for dataset, w in folders)
    )
    block = math.lcm(*(component.share.denominator for component in components))
    if block > MAX_BLOCK:
        found = f"{block:,}" if block < 1 << 63 else "far too many"
        raise ConfigError(
            f"data.path={path!r}: the smallest block with exactly these proportions has {found} "
            f"samples, and it must have at most {MAX_BLOCK:,}; write the weights with fewer digits."
        )
    names = _unique_names(components)
    return Mixture(
        path=path,
        components=tuple(
            dataclasses.replace(component, name=name)
            for component, name in zip(components, names, strict=True)
        ),
    )


def _parts(dataset: Dataset, share: Fraction) -> Iterator[Component]:
    weights = [source.weight for source in dataset.manifest.sources]
    given = [Fraction(repr(weight)) for weight in weights if weight is not None]
    if not given:
        yield Component(name=dataset.path.name, share=share, dataset=dataset, source=None)
        return
    assert len(given) == len(weights), "`prepare` weights all sources or none"
    for number, (source, weight) in enumerate(zip(dataset.manifest.sources, given, strict=True)):
        part = share * weight / sum(given)
        yield Component(name=source.spec, share=part, dataset=dataset, source=number)


def _unique_names(components: Sequence[Component]) -> list[str]:
    """Returns a name for each component; adds the path or a number to equal names."""
    names = [component.name for component in components]
    paths = [
        str(c.dataset.path) if c.source is None else f"{c.dataset.path}/{c.name}"
        for c in components
    ]
    for longer in (paths, [f"{path}#{number}" for number, path in enumerate(paths, 1)]):
        count = Counter(names)
        names = [n if count[n] == 1 else other for n, other in zip(names, longer, strict=True)]
    return names
