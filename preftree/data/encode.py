"""Preference pairs -> token ids, so that training sees exactly the context that generation will see.

- The prompt is what `apply_chat_template(add_generation_prompt=True)` gives. A tokenizer without a chat
  template gets `PLAIN_CHAT_TEMPLATE`, and before it the BOS that the tokenizer itself would put there.
- A response is what the rendered conversation adds to the prompt, up to and including the token that ends
  the assistant's turn, and nothing after it. That token, the terminator, is the first control token that the
  template writes behind an answer (`<|im_end|>`, `<end_of_turn>`, `</s>`, …), else the tokenizer's EOS:
  generation has to stop at it. Terminator or EOS inside an answer end it: generation could not go past them.
- Prompt ids are a prefix of the ids of prompt + response. Where the template or a merge of tokens across the
  boundary breaks that, the response is encoded on its own: a boundary repair.
- A prompt longer than `max_prompt_length` keeps its end (and a BOS at its start), a response is cut to
  `max_length` - prompt; a cut response has no terminator.
- Texts are not stripped here; a template may do so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from preftree.data.record import PreferencePair, Turn
from preftree.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### Assistant:\n' }}{% endif %}"
)
"""The format for a tokenizer without a chat template: headings "### System:", "### User:", "### Assistant:",
as Intel's neural-chat models are prompted. Save it with the model, or generation will prompt differently.
(The 2023 script itself ran system and question together, with nothing between them and no heading.)"""

PROMPT_EMPTY = "the prompt is empty"
PROMPT_REFUSED = "the chat template refuses the conversation"
CHOSEN_EMPTY = "the chosen answer is empty"
REJECTED_EMPTY = "the rejected answer is empty"
IDENTICAL = "chosen and rejected are identical"
IDENTICAL_CUT = "chosen and rejected became identical by cutting them to max_length"

_BATCH = 256
_QUESTION, _ANSWER = "probe-question", "probe-answer"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair. A sequence is `prompt_ids` + `chosen_ids` or `prompt_ids` + `rejected_ids`; only
    the response's tokens are scored. `row` and `source` are those of the `PreferencePair`."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    row: int
    source: str


@dataclass(slots=True)
class EncodeReport:
    """What encoding did. `read`, `kept` and `dropped` (reason -> count) count all pairs, the rest kept ones.

    `prompts_cut` and `systems_folded` count prompts. `responses_cut`, `boundary_repairs` (encoded on their
    own) and `early_ends` (with a terminator or EOS in their text) count responses. `terminator` is the token
    at which generation has to stop, `notes` what is peculiar about this tokenizer.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    responses_cut: int = 0
    boundary_repairs: int = 0
    early_ends: int = 0
    systems_folded: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    terminator: str = ""
    terminator_id: int = -1
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Plain sentences for people; nothing is said of what did not happen."""
        tokens = f"{self.prompt_tokens} prompt tokens and {self.response_tokens} response tokens"
        said = [f"Encoded {self.kept} of {self.read} pairs: {tokens}. Answers end with {self.terminator}."]
        said += [f"Dropped {count} pairs: {reason}." for reason, count in self.dropped.items()]
        counts = {
            "prompts were cut to max_prompt_length, keeping their end": self.prompts_cut,
            "responses were cut to max_length and have no end token": self.responses_cut,
            "responses were encoded on their own, as a token crossed the prompt's end": self.boundary_repairs,
            "responses held an end token in their text and were ended there": self.early_ends,
            "system texts were put into the first user turn, for want of a system role": self.systems_folded,
        }
        return said + [f"{count} {text}." for text, count in counts.items() if count] + self.notes


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[EncodedPair], EncodeReport]:
    """Encodes `pairs` in order, as the module's docstring says, and reports on it.

    `max_length` bounds prompt + response and `max_prompt_length` the prompt, both in tokens. `progress` is
    called with (pairs done, pairs in all) after each batch. Pairs that end up empty or identical are dropped
    and counted, never an error.

    Raises SettingsError where the lengths contradict each other or leave no room for the assistant header,
    and ModelError where the tokenizer has no end token or its template cannot render question and answer.
    """
    _check_lengths(max_length, max_prompt_length)
    chat = _Chat(tokenizer)
    if chat.header_tokens >= max_prompt_length:
        raise SettingsError(
            f"max_prompt_length must be greater than {chat.header_tokens}, the number of tokens that open "
            f"the assistant's turn. Got {max_prompt_length} instead."
        )
    report = EncodeReport(terminator=chat.terminator, terminator_id=chat.terminator_id, notes=chat.notes)
    encoded: list[EncodedPair] = []
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        items = [item for pair in batch if (item := _rendered(pair, chat, report)) is not None]
        _tokenize(items, chat)
        kept = (_within(item, chat, max_length, max_prompt_length, report) for item in items)
        encoded += [pair for pair in kept if pair is not None]
        report.read += len(batch)
        if progress is not None:
            progress(report.read, len(pairs))
    report.kept = len(encoded)
    return encoded, report


def _check_lengths(max_length: int, max_prompt_length: int) -> None:
    if max_prompt_length >= max_length:
        got = f"Got max_prompt_length {max_prompt_length} and max_length {max_length} instead."
        raise SettingsError(f"max_prompt_length must be less than max_length, to leave room for an answer. {got}")


# --- one batch: render, tokenize, cut -------------------------------------------------------------


@dataclass(slots=True)
class _Item:
    """A pair on its way: its rendered texts, then its uncut ids."""

    pair: PreferencePair
    prompt: str
    context: str  # the end of `prompt` that is enough to see what a token at the boundary would merge
    responses: list[str]
    follows: list[bool]  # whether the rendered conversation begins with the rendered prompt
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    repairs: int = 0


def _rendered(pair: PreferencePair, chat: _Chat, report: EncodeReport) -> _Item | None:
    """The texts of a pair, or None (and a count) where it has nothing to learn from."""
    reason = None
    if not (pair.system or "").strip() and not any(turn.content.strip() for turn in pair.turns):
        reason = PROMPT_EMPTY
    elif not pair.chosen.strip():
        reason = CHOSEN_EMPTY
    elif not pair.rejected.strip():
        reason = REJECTED_EMPTY
    elif pair.chosen == pair.rejected:
        reason = IDENTICAL
    if reason is not None:
        report.dropped[reason] += 1
        return None
    messages = chat.messages(pair)
    answers = (pair.chosen, pair.rejected)
    try:
        prompt = chat.prompt(messages)
        full = [chat.conversation(messages, answer) for answer in answers]
    except TemplateError as error:
        report.dropped[f"{PROMPT_REFUSED} ({error})"] += 1
        return None
    follows = [text.startswith(prompt) for text in full]
    responses = [
        chat.without_tail(text[len(prompt) :] if fits else answer + chat.tail)
        for text, fits, answer in zip(full, follows, answers, strict=True)
    ]
    return _Item(pair, prompt, chat.context(prompt), responses, follows)


def _tokenize(items: list[_Item], chat: _Chat) -> None:
    """Fills in the ids, with one call of the tokenizer for all texts and one for repairs."""
    texts = {text for item in items for text in (item.prompt, item.context)}
    texts |= {item.context + response for item in items for response in item.responses}
    ids = chat.tokenize(texts)
    broken: list[tuple[_Item, int]] = []
    for item in items:
        prompt, context = ids[item.prompt], ids[item.context]
        item.prompt_ids = chat.with_bos(prompt)
        for side, (response, follows) in enumerate(zip(item.responses, item.follows, strict=True)):
            joined = ids[item.context + response]
            item.response_ids.append(joined[len(context) :])
            # No token reaches across the boundary: the joined ids go on from the prompt's.
            whole = joined[: len(context)] == context and prompt[len(prompt) - len(context) :] == context
            if not (follows and whole):
                broken.append((item, side))
    alone = chat.tokenize({item.responses[side] for item, side in broken})
    for item, side in broken:
        item.response_ids[side] = alone[item.responses[side]]
        item.repairs += 1


def _within(
    item: _Item, chat: _Chat, max_length: int, max_prompt_length: int, report: EncodeReport
) -> EncodedPair | None:
    """The pair within its lengths, or None (and a count) where that leaves nothing to prefer."""
    pair = item.pair
    (full_chosen, early_chosen), (full_rejected, early_rejected) = map(chat.ended, item.response_ids)
    prompt = chat.cut_prompt(item.prompt_ids, max_prompt_length)
    room = max_length - len(prompt)
    chosen, rejected = full_chosen[:room], full_rejected[:room]
    reason = None
    if len(full_chosen) < 2:
        reason = CHOSEN_EMPTY
    elif len(full_rejected) < 2:
        reason = REJECTED_EMPTY
    elif chosen == rejected:
        reason = IDENTICAL if full_chosen == full_rejected else IDENTICAL_CUT
    if reason is not None:
        report.dropped[reason] += 1
        return None
    report.early_ends += early_chosen + early_rejected
    report.boundary_repairs += item.repairs
    report.systems_folded += chat.folds_system and bool(pair.system)
    report.prompts_cut += len(prompt) < len(item.prompt_ids)
    report.responses_cut += (len(full_chosen) > room) + (len(full_rejected) > room)
    report.prompt_tokens += len(prompt)
    report.response_tokens += len(chosen) + len(rejected)
    return EncodedPair(tuple(prompt), tuple(chosen), tuple(rejected), pair.row, pair.source)


# --- a tokenizer and its template -----------------------------------------------------------------

Messages = list[dict[str, str]]
_PROBE: Messages = [{"role": "user", "content": _QUESTION}]


class _Chat:
    """A tokenizer, its chat template, and what was found out about the two by rendering a probe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._plain = not tokenizer.chat_template
        try:
            lead, self.tail = self._probe()
        except TemplateError as error:
            raise ModelError(
                f"The tokenizer's chat template cannot render one question and its answer: {error}. "
                f"Use a tokenizer with a working chat template, or remove its chat_template."
            ) from error
        self.folds_system = self._loses_system()
        self.terminator_id, self._tail_tokens = self._find_terminator()
        self.terminator = str(tokenizer.convert_ids_to_tokens(self.terminator_id))
        self._stops = {self.terminator_id, tokenizer.eos_token_id}
        self._own_bos = self._find_own_bos()
        self._cut_at = self._last_control_text()
        self.notes = self._notes(lead)

    def prompt(self, messages: Messages, generation: bool = True) -> str:
        """The rendered messages, with what opens the assistant's turn."""
        template = PLAIN_CHAT_TEMPLATE if self._plain else None
        render = self.tokenizer.apply_chat_template
        return str(render(messages, chat_template=template, add_generation_prompt=generation, tokenize=False))

    def conversation(self, messages: Messages, answer: str) -> str:
        """The rendered messages with the answer that completes them."""
        return self.prompt([*messages, {"role": "assistant", "content": answer}], generation=False)

    def messages(self, pair: PreferencePair) -> Messages:
        """System and turns as message dicts; an empty system text is no system turn."""
        turns = list(pair.turns)
        if pair.system and self.folds_system:
            first = turns.pop(0).content if turns and turns[0].role == "user" else ""
            turns.insert(0, Turn("user", f"{pair.system}\n\n{first}" if first else pair.system))
        elif pair.system:
            turns.insert(0, Turn("system", pair.system))
        return [{"role": turn.role, "content": turn.content} for turn in turns]

    def tokenize(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Text -> ids, with no special tokens but those that stand in the text."""
        ordered = list(texts)
        if not ordered:
            return {}
        encoding = self.tokenizer(ordered, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return dict(zip(ordered, encoding["input_ids"], strict=True))

    def context(self, prompt: str) -> str:
        """The end of `prompt` from a control token on, or all of it where there is none.

        A fast tokenizer cuts a text at its control tokens before anything else. So nothing before one changes
        how the boundary is tokenized, and a long prompt is not tokenized again for each response.
        """
        return prompt[max(prompt.rfind(self._cut_at), 0) :] if self._cut_at else prompt

    def with_bos(self, ids: list[int]) -> list[int]:
        """The prompt with the BOS that the plain format needs, and one BOS where a template wrote several."""
        bos = self.tokenizer.bos_token_id
        if ids[:1] != self._own_bos:
            ids = self._own_bos + ids
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def cut_prompt(self, ids: list[int], length: int) -> list[int]:
        """The last `length` tokens; a BOS at the start stays and takes one of the places."""
        if len(ids) <= length:
            return ids
        bos = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
        return bos + ids[len(ids) - length + len(bos) :]

    def without_tail(self, response: str) -> str:
        """A rendered response without the template's tail, where no token of that tail ends the turn."""
        return response if self._tail_tokens else response.removesuffix(self.tail)

    def ended(self, ids: list[int]) -> tuple[list[int], bool]:
        """A response up to its first end token, now the terminator; and whether its text went on."""
        first = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        return [*ids[:first], self.terminator_id], len(ids) - first > self._tail_tokens

    @property
    def header_tokens(self) -> int:
        """How many tokens the generation prompt adds to the conversation, with a BOS if there is one."""
        prompt, bare = self.prompt(_PROBE), self.prompt(_PROBE, generation=False)
        added = prompt[len(bare) :] if prompt.startswith(bare) else ""
        ids = self.with_bos(self.tokenize([prompt])[prompt])
        return len(self.tokenize([added])[added]) + (ids[:1] == [self.tokenizer.bos_token_id])

    def _probe(self) -> tuple[str, str]:
        """What the template writes between the prompt and an answer, and what behind the answer."""
        prompt, full = self.prompt(_PROBE), self.conversation(_PROBE, _ANSWER)
        before, found, tail = full.rpartition(_ANSWER)
        if not found or _QUESTION not in prompt:
            raise TemplateError("the question or the answer is not in its output")
        return before[len(prompt) :] if before.startswith(prompt) else "", tail

    def _loses_system(self) -> bool:
        try:
            return "probe-system" not in self.prompt([{"role": "system", "content": "probe-system"}, *_PROBE])
        except TemplateError:
            return True

    def _find_terminator(self) -> tuple[int, int]:
        """The token that ends an assistant's turn, and how many tokens the template writes from it on."""
        added = self.tokenizer.added_tokens_decoder
        control = {number for number, token in added.items() if token.content.strip()}
        control |= set(self.tokenizer.all_special_ids)
        tail = self.tokenize([self.tail])[self.tail]
        place = next((place for place, token in enumerate(tail) if token in control), None)
        if place is not None:
            return tail[place], len(tail) - place
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "The tokenizer has no end-of-sequence token and its chat template writes none behind an "
                "answer, so generation would never stop. Set the tokenizer's eos_token."
            )
        return int(self.tokenizer.eos_token_id), 0

    def _find_own_bos(self) -> list[int]:
        """The BOS that the tokenizer itself puts before a text; chat templates write their own or none."""
        first = self.tokenizer(_QUESTION)["input_ids"][:1] if self._plain else []
        return first if first == [self.tokenizer.bos_token_id] else []

    def _last_control_text(self) -> str:
        """The control token nearest to the end of every prompt; "" if none, or for a slow tokenizer."""
        tokens = self.tokenizer.added_tokens_decoder.values() if self.tokenizer.is_fast else ()
        usable = [t.content for t in tokens if t.special and not t.normalized and not t.single_word]
        prompt = self.prompt(_PROBE)
        return max((text for text in usable if text in prompt), key=prompt.rfind, default="")

    def _notes(self, lead: str) -> list[str]:
        notes = []
        if self._plain:
            notes.append("The tokenizer has no chat template: ### System, ### User, ### Assistant is used.")
        elif not self._tail_tokens:
            notes.append(f"The chat template writes no end token behind an answer: {self.terminator} is added.")
        if lead.strip():
            where = f"The chat template writes {lead!r} before an answer but not in its generation prompt"
            notes.append(f"{where}: the model has to generate it, so it counts as part of the answer.")
        return notes
