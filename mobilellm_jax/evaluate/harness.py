"""Lets lm-evaluation-harness (Gao et al.; the `eval` extra) evaluate our models.

The harness sends strings. We encode a string into the same token ids as the harness' `hf` model
does. A text begins with BOS if other programs also put BOS before every text of this tokenizer.
Trailing spaces of a context move to the beginning of the continuation. Context and continuation are
encoded together, and the token count of the context alone says where the continuation begins. If a
text is too long for the model, its first tokens are dropped.
"""

import collections
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, text_ids
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import Engine, RuntimeEngine, Writer
from mobilellm_jax.evaluate.journal import Journal, key
from mobilellm_jax.evaluate.prefix_trees import Query, make_query
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY, Sampling
from mobilellm_jax.model.size import parameter_count

_MAX_NEW_TOKENS = 256  # The harness' limit of new tokens for a task that sets no limit.
_PROMPT_TOKENS = 16_384  # Largest number of prompt tokens in a batch of several prompts.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
# Settings of features that we do not support. Tasks may set these values, which switch them off.
_SWITCHED_OFF = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class _Prompt(NamedTuple):
    ids: list[int]
    settings: str  # A JSON text, which can be the key of a dict.
    stream: int  # The text's number among the random streams of the seed; 0 for a greedy text.


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A model for the harness; it computes only the answers that are not in the journal.

    `origin` is the name of the model in the harness' record. With `show`, a progress bar appears on
    a terminal.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        journal: Journal,
        *,
        origin: str,
        show: bool = True,
    ) -> None:
        super().__init__()
        self.cut = 0  # Number of requests that were too long and lost their first tokens.
        self._engine = engine
        self._tokens = tokenizer
        self._journal = journal
        self._origin = origin
        self._show = show

    @property
    def config(self) -> ModelConfig:
        return self._engine.config

    @property
    def draws(self) -> bool:
        """Whether the engine can sample texts."""
        return not isinstance(self._engine, RuntimeEngine)

    @property
    def max_length(self) -> int:
        return self._engine.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.sha256

    def get_model_info(self) -> dict[str, Any]:
        """Returns facts about the model; the harness adds them to its record of the run."""
        return {
            "model": self._origin,
            "model_num_parameters": parameter_count(self._engine.config),
            "model_dtype": self._engine.precision,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        if add_special_tokens is False:
            return self._tokens.encode(string)
        return text_ids(self._tokens, string)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        # Tokenisation is quick, so the harness need not show a progress bar for it.
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(pair) for pair in cut]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: object
    ) -> list[tuple[float, bool]]:
        queries: dict[str, Query] = {}
        keys = []
        for _strings, context, continuation in requests:
            query = make_query(context, continuation, self.max_length)
            self.cut += len(query.tokens) < len(context) + len(continuation) - 1
            keys.append(key("log-likelihood", query.tokens, query.targets))
            queries[keys[-1]] = query

        def compute(asked: list[str]) -> Iterator[dict[str, Any]]:
            for scores in self._engine.scores([queries[name] for name in asked]):
                yield {asked[number]: list(score) for number, score in scores}

        answers = self._answers(queries, "likelihood", compute)
        return [tuple(answers[name]) for name in keys]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts: dict[str, _Prompt] = {}
        keys = []
        for request, stream in zip(requests, _streams(requests), strict=True):
            text = request.args[0]
            how = writing_settings(request, self.config, self.draws)
            room = self.max_length - how["max_gen_toks"]
            ids = self.tok_encode(text)
            self.cut += len(ids) > room
            ids = ids[-room:]
            written = json.dumps(how, sort_keys=True)
            # Equal prompts have one greedy text, but each sampled text has its own random stream.
            identity = [stream] if _sampling(how).temperature > 0 else []
            keys.append(key("text", ids, written, *identity))
            prompts[keys[-1]] = _Prompt(ids, written, *(identity or [0]))

        def compute(asked: list[str]) -> Iterator[dict[str, Any]]:
            write = self._engine.writer()
            for names in _batches(asked, prompts, self._engine.prompts_at_once):
                texts = self._continue(write, [prompts[name] for name in names])
                yield dict(zip(names, texts, strict=True))

        answers = self._answers(prompts, "text", compute)
        return [answers[name] for name in keys]

    def _answers(
        self,
        names: Mapping[str, object],
        unit: str,
        compute: Callable[[list[str]], Iterator[dict[str, Any]]],
    ) -> dict[str, Any]:
        """Computes the answers that the journal lacks, and returns all answers of the journal."""
        asked = [name for name in names if name not in self._journal.answers]
        if not asked:
            return self._journal.answers
        done = len(names) - len(asked)
        # With disable=None, tqdm shows the bar only on a terminal.
        hidden = None if self._show else True
        with tqdm(total=len(names), initial=done, unit=unit, disable=hidden) as bar:
            for new in compute(asked):
                self._journal.add(new.items())
                bar.update(len(new))
        return self._journal.answers

    def _continue(self, write: Writer, prompts: Sequence[_Prompt]) -> list[str]:
        """Returns the text that continues each prompt, up to the first stop string.

        All prompts have the settings of the first.
        """
        how = json.loads(prompts[0].settings)
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        stopped = [False] * len(prompts)
        request = generate.Request(
            [prompt.ids for prompt in prompts],
            max_new_tokens=how["max_gen_toks"],
            sampling=_sampling(how),
            end_ids=self._tokens.convention.end_ids,
            streams=[prompt.stream for prompt in prompts],
        )
        for part in write(request):
            for b, new in enumerate(part):
                if new and not stopped[b]:
                    rows[b] += new
                    texts[b] = decode(self._tokens, rows[b])
                    stopped[b] = any(stop in texts[b] for stop in how["until"] if stop)
            if all(done or not new for done, new in zip(stopped, part, strict=True)):
                break  # A row without new tokens has reached EOS.
        for stop in filter(None, how["until"]):
            texts = [text.split(stop)[0] for text in texts]
        return texts


def writing_settings(request: Instance, config: ModelConfig, draws: bool) -> dict[str, Any]:
    """Returns the settings of a request to generate text, normalized, and with the defaults.

    `draws` says whether the engine can sample texts.

    Raises:
      UserError: if a setting is not supported or has an impossible value.
    """
    _, settings = request.args
    asks = f"The task {request.task_name} asks for" if request.task_name else "A task asks for"
    # With a small max_seq_len, half of it is the default limit; the prompt gets the other half.
    longest = config.max_seq_len
    most = longest // 2 if longest <= _MAX_NEW_TOKENS else _MAX_NEW_TOKENS
    try:
        how: dict[str, Any] = {**normalize_gen_kwargs(settings, most)}
        sampling = _sampling(how)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{asks} texts with an impossible setting; leave the task out: {error}"
        ) from error
    for name, value in _SWITCHED_OFF.items():
        if how.get(name) == value:
            del how[name]
    unknown = [f"{name}={how[name]}" for name in sorted(how.keys() - _SETTINGS)]
    unknown += [f"until={stop!r}" for stop in how["until"] if stop and not isinstance(stop, str)]
    if unknown:
        raise UserError(
            f"{asks} texts with {', '.join(unknown)}, which is not supported; the settings are "
            f"{', '.join(sorted(_SETTINGS))}. Leave the task out."
        )
    if not 1 <= how["max_gen_toks"] < longest:
        raise UserError(
            f"{asks} texts of up to {how['max_gen_toks']} tokens, which must be less than "
            f"model.max_seq_len={longest} and at least 1; leave the task out."
        )
    if sampling.temperature > 0 and not draws:
        raise UserError(
            f"{asks} sampled texts, and an exported model only writes the likeliest tokens; "
            "leave the task out, or evaluate the checkpoint."
        )
    return how


def _streams(requests: Iterable[Instance]) -> Iterator[int]:
    """Yields the number of each request, which selects the random stream for sampling its text.

    The number depends on the task, the document and the repeat, and not on the other requests. The
    repeats of a document have consecutive numbers, so no two repeats have the same number.
    """
    repeats: collections.Counter[str] = collections.Counter()
    for request in requests:
        document = key("document", request.task_name, request.doc_id, request.idx)
        yield (int(document[:8], 16) + repeats[document]) % 2**32
        repeats[document] += 1


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decodes token ids to the text that transformers would return.

    The result differs from `tokenizer.decode` only for broken texts. Transformers drops the unknown
    token. If a run of byte tokens is not UTF-8, transformers shows one U+FFFD for each byte, while
    SentencePiece keeps the valid characters of the run.
    """
    known = [i for i in ids if i != tokenizer.unknown_id]
    byte_of = {i: byte for byte, i in enumerate(tokenizer.byte_ids)}
    shown: list[int] = []
    for is_bytes, group in itertools.groupby(known, key=byte_of.__contains__):
        run = list(group)
        content = bytes(byte_of[i] for i in run) if is_bytes else b""
        if content.decode("utf-8", "ignore").encode() != content:
            run = [tokenizer.byte_ids[byte] for byte in _REPLACEMENT] * len(run)
        shown += run
    return tokenizer.decode(shown)


def _sampling(how: dict[str, Any]) -> Sampling:
    if not how["do_sample"]:
        return GREEDY
    return Sampling(
        temperature=float(how.get("temperature", 1.0)),
        top_k=int(how.get("top_k", 0)),
        top_p=float(how.get("top_p", 1.0)),
    )


def _batches(names: Iterable[str], prompts: dict[str, _Prompt], most: int) -> Iterable[list[str]]:
    """Yields batches of names; the prompts of a batch have equal settings and similar lengths."""
    alike = collections.defaultdict(list)
    for name in names:
        alike[prompts[name].settings].append(name)
    for group in alike.values():
        left = sorted(group, key=lambda name: -len(prompts[name].ids))
        while left:
            size = min(most, max(1, _PROMPT_TOKENS // len(prompts[left[0]].ids)))
            batch, left = left[:size], left[size:]
            yield batch
