"""A tokenizer with its chat template: how a conversation is rendered, for training and for generation alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from preftree.data.fields import whole_characters
from preftree.data.record import Turn
from preftree.data.time_limit import TemplateTimeout, time_limit
from preftree.errors import ModelError
from preftree.hardware.limits import growth_within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Extras = Mapping[str, Any]
"""What a chat template is given beside the messages: `tools`, and variables of its own."""

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

_SYSTEM, _QUESTION, _ANSWER = "probe-system", "probe-question", "probe-answer"
#: Bytes that a template may take for a question of one word: one line can ask for all that there is.
_TEMPLATE_MEMORY = 2**30
_PROBE: Messages = [{"role": "user", "content": _QUESTION}]


class Chat:
    """A tokenizer, its chat template, and what was found out about the two by rendering a probe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ids = _batch_encoder(tokenizer)
        self._plain = not tokenizer.chat_template
        self._in_parts = False
        with time_limit(), growth_within(_TEMPLATE_MEMORY):
            self._find_out()

    def _find_out(self) -> None:
        """Everything that is asked of the template once."""
        tokenizer = self.tokenizer
        try:
            lead, self.tail = self._probe_either()
        except TemplateError as error:
            raise ModelError(
                f"The tokenizer's chat template cannot render one question and its answer: {str(error).rstrip('.')}. "
                f"Use a tokenizer with a working chat template, or remove its chat_template."
            ) from error
        self.folds_system = self._loses_system()
        self.terminator_id, self._tail_tokens = self._find_terminator()
        self.terminator = str(tokenizer.convert_ids_to_tokens(self.terminator_id))
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stops = {self.terminator_id, tokenizer.eos_token_id}
        self._own_bos = self._find_own_bos()
        self._cut_at = self._last_control_text()
        self.notes = self._notes(lead)

    def prompt(self, messages: Messages, generation: bool = True, extras: Extras | None = None) -> str:
        """The rendered messages, with what opens the assistant's turn.

        Raises TemplateError for whatever the template does not render.
        """
        return self._render(messages, extras, add_generation_prompt=generation)

    def continued(self, messages: Messages, extras: Extras | None = None) -> str:
        """The rendered messages up to where the last one's text ends, so that it goes on from there."""
        return self._render(messages, extras, continue_final_message=True)

    def conversation(self, messages: Messages, answer: Turn, extras: Extras | None = None) -> str:
        """The rendered messages with the answer that completes them."""
        return self.prompt([*messages, self.message(answer)], generation=False, extras=extras)

    def messages(self, system: str | None, turns: Sequence[Turn]) -> Messages:
        """System and turns as message dicts; None is no system turn, an empty text is one, as the template has it."""
        turns = list(turns)
        if system and self.folds_system:
            first = turns.pop(0) if turns and turns[0].role == "user" else Turn("user", "")
            text = f"{system}\n\n{first.content}" if first.content else system
            turns.insert(0, replace(first, content=text))
        elif system or (system is not None and not self._plain and not self.folds_system):
            turns.insert(0, Turn("system", system))
        return [self.message(turn) for turn in turns]

    def message(self, turn: Turn) -> dict[str, Any]:
        """A turn as the template takes it, with all its keys."""
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if not turn.keys:
            return message
        message |= json.loads(turn.keys)
        if message["content"] is None:
            if self._takes_no_content:
                del message["content"]
            else:
                message["content"] = ""
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return message

    def _render(self, messages: Messages, extras: Extras | None, **options: bool) -> str:
        template = PLAIN_CHAT_TEMPLATE if self._plain else None
        render = self.tokenizer.apply_chat_template
        messages = [_in_parts(message) for message in messages] if self._in_parts else messages
        try:
            return str(render(messages, chat_template=template, tokenize=False, **options, **(extras or {})))
        except (TemplateError, TemplateTimeout):
            raise
        except Exception as error:  # a template is a program: it divides by zero, adds texts to numbers, …
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def _call(self, call: Any) -> Any:
        """A tool call with its arguments in the form that the template writes: an object, or its JSON text."""
        within = call.get("function", call) if isinstance(call, dict) else None
        given = within.get("arguments") if isinstance(within, dict) else None
        text, parsed = self._argument_forms
        if isinstance(given, str) and not text and parsed:
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                return call
        elif isinstance(given, dict) and text and not parsed:
            given = json.dumps(given, ensure_ascii=False)
        else:
            return call
        within = {**(within or {}), "arguments": given}
        return {**call, "function": within} if "function" in call else within

    @cached_property
    def _argument_forms(self) -> tuple[bool, bool]:
        """Does the template write a call's arguments given as JSON text, and given as an object?"""
        text = self._writes_call('{"probe_key": "probe_value"}')
        written = "" if text is None else text
        as_text = '"probe_key"' in written and '\\"probe_key' not in written
        parsed = self._writes_call({"probe_key": "probe_value"})
        return as_text, parsed is not None and "probe_value" in parsed

    @cached_property
    def _takes_no_content(self) -> bool:
        """Does the template render a call without a content?"""
        text = self._writes_call({"probe_key": "probe_value"}, content=None)
        return text is not None and "None" not in text

    def _writes_call(self, arguments: Any, content: str | None = "") -> str | None:
        """A conversation that ends with a call, rendered; None where it cannot be."""
        call = {"id": "call00000", "type": "function", "function": {"name": "probe_name", "arguments": arguments}}
        asked = {"role": "assistant", "tool_calls": [call]} | ({} if content is None else {"content": content})
        try:
            return self.prompt([*_PROBE, asked], generation=False)
        except TemplateError:
            return None

    def tokenize(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Text -> ids, with no special tokens but those that stand in the text.

        Lone surrogates, which no tokenizer takes, count as U+FFFD.
        """
        ordered = list(texts)
        if not ordered:
            return {}
        try:
            ids = self._ids(ordered)
        except (TypeError, UnicodeEncodeError):  # what tokenizers say to lone surrogates; rare, so not looked for
            ids = self._ids([whole_characters(text) for text in ordered])
        return dict(zip(ordered, ids, strict=True))

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

    def prompt_ids(self, text: str) -> list[int]:
        """A rendered prompt as token ids, with its BOS."""
        return self.with_bos(self.tokenize([text])[text])

    def cut_prompt(self, ids: tuple[int, ...], length: int) -> tuple[int, ...]:
        """The last `length` tokens; a BOS at the start stays and takes one of the places."""
        if len(ids) <= length:
            return ids
        bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else ()
        return bos + ids[len(ids) - length + len(bos) :]

    def without_tail(self, response: str) -> str:
        """A rendered response without the template's tail, where no token of that tail ends the turn."""
        return response if self._tail_tokens else response.removesuffix(self.tail)

    def ended(self, ids: list[int]) -> tuple[list[int], bool]:
        """A response up to its first end token, now the terminator; and whether its text went on."""
        first = min((ids.index(stop) for stop in self._stops if stop in ids), default=len(ids))
        if first == len(ids) > 0 and self._tail_tokens and ids[-1] in self._special:
            return ids, False  # the template ends this turn with another token of its own, as a call's is
        return [*ids[:first], self.terminator_id], len(ids) - first > self._tail_tokens

    @property
    def header_tokens(self) -> int:
        """How many tokens the generation prompt adds to the conversation, with a BOS if there is one."""
        prompt, bare = self.prompt(_PROBE), self.prompt(_PROBE, generation=False)
        added = prompt[len(bare) :] if prompt.startswith(bare) else ""
        ids = self.prompt_ids(prompt)
        return len(self.tokenize([added])[added]) + (ids[:1] == [self.tokenizer.bos_token_id])

    def _probe_either(self) -> tuple[str, str]:
        """`_probe` with contents as text, else in parts, as templates of models that also see want them."""
        try:
            return self._probe()
        except TemplateError as error:
            self._in_parts = True
            try:
                return self._probe()
            except TemplateError:
                raise error from None

    def _probe(self) -> tuple[str, str]:
        """What the template writes between the prompt and an answer, and what behind the answer."""
        prompt, full = self.prompt(_PROBE), self.conversation(_PROBE, Turn("assistant", _ANSWER))
        before, found, tail = full.rpartition(_ANSWER)
        if not found or _QUESTION not in prompt:
            raise TemplateError("the question or the answer is not in its output")
        return before[len(prompt) :] if before.startswith(prompt) else "", tail

    def _own_system(self) -> str:
        """The system text that the template writes for a conversation without one; "" for none."""
        if self.folds_system:
            return ""
        bare, told = self.prompt(_PROBE), self.prompt([{"role": "system", "content": _SYSTEM}, *_PROBE])
        before, behind = (part.strip() for part in told.partition(_QUESTION)[0].split(_SYSTEM, 1))
        written = bare.partition(_QUESTION)[0].strip()
        if not (before and behind and written.startswith(before) and written.endswith(behind)):
            return ""
        return written[len(before) : len(written) - len(behind)].strip()

    def _loses_system(self) -> bool:
        try:
            return _SYSTEM not in self.prompt([{"role": "system", "content": _SYSTEM}, *_PROBE])
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
        if own := self._own_system():
            notes.append(f"The chat template writes a system text of its own where a conversation has none: {own!r}.")
        if "strftime_now" in str(self.tokenizer.chat_template):
            notes.append("The chat template writes the date: prompts encoded on another day are other prompts.")
        if lead.strip():
            where = f"The chat template writes {lead!r} before an answer but not in its generation prompt"
            notes.append(f"{where}: the model has to generate it, so it counts as part of the answer.")
        return notes


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def refuse_broken_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError where the tokenizer's chat template loops, or cannot render one question."""
    try:
        with time_limit(), growth_within(_TEMPLATE_MEMORY):
            tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
    except TemplateTimeout:
        raise
    except Exception as error:  # whatever a program can raise
        reason = str(error).rstrip(".") or type(error).__name__
        raise ModelError(f"The tokenizer's chat template cannot render one question: {reason}.") from error


def _batch_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids without special tokens of the tokenizer's own: its Rust part alone, where that says the same.

    That leaves out offsets, masks and their copies, a fifth of the work. A tokenizer class may do more than its
    Rust part, so the two are compared on a text that holds what such classes change.
    """

    def plainly(texts: list[str]) -> list[list[int]]:
        encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoding["input_ids"])

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        return plainly

    def fast(texts: list[str]) -> list[list[int]]:
        # What the tokenizer's file asked for, or an earlier call left behind.
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    probe = [f" {_QUESTION}\n\n{''.join(tokenizer.all_special_tokens)} Ünï {_ANSWER} 12 " * 8, "a"]
    return fast if fast(probe) == plainly(probe) else plainly
