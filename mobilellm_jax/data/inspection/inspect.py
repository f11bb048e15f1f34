"""Checks and counts folders of token shards, and writes the output of `mobilellm inspect`.

The numbers of documents and of text bytes come from the manifest. The numbers of tokens, the
lengths and the shares are computed from the shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.inspection.token_counts import (
    TokenCounts,
    by_doubling,
    count_tokens,
    median,
    no_tokens,
)
from mobilellm_jax.data.inspection.window_text import LEGEND, escaped, window_lines
from mobilellm_jax.data.mixture import Mixture, open_mixture
from mobilellm_jax.data.shards import MANIFEST, Counts, Dataset, Manifest
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.verification import verify_files

_COLUMNS = 88
_BAR_COLUMNS = 40
_ROW = "{:<12}{:>13}{:>18}{:>18}{:>9}{:>9}{:>9}"


def inspect(
    data: DataConfig, samples: int, report: Callable[[str], None], first_sample: int = 0
) -> None:
    """Checks the data in `data.path`, counts its tokens, and shows some training windows.

    Raises:
      MissingFileError: if a folder or file is missing.
      UserError: if a file is damaged, or there is no window to show.
    """
    mixture = open_mixture(data.path)
    tokenizer = load_tokenizer(mixture.tokenizer, ours=True)
    for dataset in mixture.datasets:
        verify_files(dataset)
        for line in _dataset_lines(dataset, tokenizer, count_sources(dataset)):
            report(line)
    for line in _mixture_lines(mixture):
        report(line)
    if samples:
        report(LEGEND)
        report("")
        for line in window_lines(mixture, tokenizer, data, samples, _COLUMNS, first_sample):
            report(line)


def count_sources(dataset: Dataset) -> Mapping[str, Sequence[TokenCounts]]:
    """Counts the tokens of each split and source in one pass over the tokens."""
    manifest = dataset.manifest
    total = sum(split.tokens for split in manifest.splits.values())
    counts: dict[str, list[TokenCounts]] = {}
    with tqdm(total=total, desc="counting", unit=" tokens", unit_scale=True, disable=None) as bar:
        for split in manifest.splits:
            streams = [dataset.source_stream(split, i) for i in range(len(manifest.sources))]
            counts[split] = [count_tokens(s, manifest.vocab_size, bar.update) for s in streams]
    return counts


def _dataset_lines(
    dataset: Dataset, tokenizer: Tokenizer, counts: Mapping[str, Sequence[TokenCounts]]
) -> Iterator[str]:
    manifest = dataset.manifest
    sizes = [
        file.bytes
        for split in manifest.splits.values()
        for shard in split.shards
        for file in shard.files.values()
    ]
    yield f"{dataset.path}: {len(sizes)} files, {sum(sizes):,} bytes, every checksum is right"
    yield ""
    yield f"Tokenizer   {manifest.tokenizer}: {tokenizer.kind}, {manifest.vocab_size:,} ids"
    yield f"            SHA-256 {manifest.tokenizer_sha256}"
    yield f"Tokens      {manifest.dtype}"
    yield ""
    yield from _source_lines(manifest)
    for split, of_sources in counts.items():
        yield from _split_lines(manifest, split, of_sources, tokenizer)
    yield from _notes()


def _source_lines(manifest: Manifest) -> Iterator[str]:
    for number, source in enumerate(manifest.sources, 1):
        weight = "" if source.weight is None else f"weight {source.weight}, "
        listed = f" (listed in {MANIFEST})" if source.bad_lines else ""
        yield f"{f'Source {number}':<12}{''.join(escaped(source.spec))}"
        yield (
            f"{'':<12}{weight}{source.empty_documents:,} empty documents and "
            f"{len(source.bad_lines):,} bad lines left out{listed}"
        )
    yield ""


def _split_lines(
    manifest: Manifest, split: str, of_sources: Sequence[TokenCounts], tokenizer: Tokenizer
) -> Iterator[str]:
    yield _ROW.format(split, "documents", "tokens", "text bytes", "B/token", "unknown", "bytes")
    for number, (source, found) in enumerate(zip(manifest.sources, of_sources, strict=True), 1):
        yield _row(f"  source {number}", source.splits.get(split, Counts()), found, tokenizer)
    total = sum(of_sources, no_tokens(manifest.vocab_size))
    if len(of_sources) > 1:
        yield _row("  together", manifest.splits[split], total, tokenizer)
    if tokenizer.byte_ids:
        others = [i for byte, i in enumerate(tokenizer.byte_ids) if byte != ord("\n")]
        yield f"  Without newlines, byte tokens are {_share(total, others)} of the tokens."
    yield ""
    yield from _length_lines(total)
    yield ""


def _row(name: str, counts: Counts, found: TokenCounts, tokenizer: Tokenizer) -> str:
    unknown = [] if tokenizer.unknown_id is None else [tokenizer.unknown_id]
    return _ROW.format(
        name,
        f"{counts.documents:,}",
        f"{found.tokens:,}",
        f"{counts.text_bytes:,}",
        f"{counts.text_bytes / max(1, found.tokens):.2f}",
        *(_share(found, ids) for ids in (unknown, tokenizer.byte_ids)),
    )


def _share(found: TokenCounts, ids: Sequence[int]) -> str:
    """Returns the percentage of tokens whose id is in `ids`, or "-" if `ids` is empty."""
    return f"{found.of_id[list(ids)].sum() / max(1, found.tokens):.2%}" if ids else "-"


def _length_lines(counts: TokenCounts) -> Iterator[str]:
    lengths = counts.documents
    mean = counts.tokens / max(1, lengths.total())
    yield (
        f"  Tokens per document: median {median(lengths):,g}, mean {mean:,.1f}, "
        f"longest {max(lengths, default=0):,}"
    )
    bins = by_doubling(lengths)
    most = max((documents for _, documents in bins), default=1)
    for low, documents in bins:
        # Rounding up gives a visible bar to every bin that is not empty.
        bar = "█" * -(-documents * _BAR_COLUMNS // most)
        yield f"  {low:>13,} to {2 * low - 1:<13,}{documents:>13,}  {bar}".rstrip()


def _notes() -> Iterator[str]:
    yield "Tokens include a BOS and an EOS for each document. unknown: the share of them that is"
    yield "the unknown token. bytes: the share that is one byte of a character without a token of"
    yield "its own. -: the tokenizer has no such tokens; a byte-level one needs none."
    yield ""


def _mixture_lines(mixture: Mixture) -> Iterator[str]:
    if len(mixture.components) > 1:
        yield f"Of every {mixture.block_counts.sum():,} training samples"
        for component, count in zip(mixture.components, mixture.block_counts, strict=True):
            yield f"  {count:>7,} are from {''.join(escaped(component.name))}"
        yield ""
