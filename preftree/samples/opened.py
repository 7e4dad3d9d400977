"""A run opened for answers: its two models, its tokenizer with chat template, and how tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from preftree.config.answers import AnswerSettings
from preftree.data.chat import Chat, Messages
from preftree.data.record import Turn
from preftree.errors import ModelError
from preftree.hardware.device import choose_device
from preftree.hardware.precision import choose_dtype
from preftree.io.console import Say
from preftree.model.adapted import ModelPair, TrainedRun, find_run, open_pair
from preftree.model.generate import Answer, Decoding, Sampling, answers, streamed_answer

Side = str
"""`base` or `trained`."""
SIDES: tuple[Side, Side] = ("base", "trained")


@dataclass(frozen=True)
class OpenRun:
    """Base and trained model of a run, ready to answer."""

    run: TrainedRun
    models: ModelPair
    chat: Chat
    system: str | None
    decoding: Decoding
    seed: int

    def messages(self, turns: Sequence[Turn], system: str | None) -> Messages:
        """The conversation as the template takes it."""
        return self.chat.messages(system, turns)

    def ids(self, messages: Messages) -> list[int]:
        """The conversation as token ids (see `conversation_ids`)."""
        return conversation_ids(self.chat, messages)

    def answers(self, side: Side, prompts: Sequence[Sequence[int]], batch_size: int) -> list[Answer]:
        """One answer of a side to each prompt; both sides draw a prompt's tokens with the same seed."""
        with self.models.side(side) as model:
            return answers(model, self.chat.tokenizer, prompts, self.decoding, self.seed, batch_size)

    def stream(self, side: Side, prompt: Sequence[int], seed: int, show: Callable[[str], None]) -> Answer:
        """An answer of a side, shown as it grows."""
        with self.models.side(side) as model:
            return streamed_answer(model, self.chat.tokenizer, prompt, self.decoding, seed, show)


def conversation_ids(chat: Chat, messages: Messages) -> list[int]:
    """A conversation as token ids, up to where the assistant's turn begins; as training encodes a prompt.

    Raises:
        ModelError: the template does not render it.
    """
    try:
        text = chat.prompt(messages)
    except TemplateError as problem:
        shown = str(messages[-1].get("content"))[:60]
        raise ModelError(f"the chat template cannot render {shown!r}: {problem}") from problem
    return chat.prompt_ids(text)


def open_run(settings: AnswerSettings, say: Say) -> OpenRun:
    """Load what the settings name.

    Raises:
        ModelError: there is no run, or one of its parts cannot be loaded.
        DeviceError: a device that is asked for and not there.
    """
    run = find_run(settings.run, settings.model)
    source = run.base_source  # before anything is loaded
    device = choose_device(settings.device)
    asked = settings.dtype if settings.dtype != "auto" else str(run.group("model").get("torch_dtype") or "auto")
    dtype = choose_dtype(device.value, asked)
    say(f"run        {run.folder} on {run.base_name or source.described}")
    say(f"device     {device}")
    say(f"precision  {dtype}")
    chat = Chat(run.tokenizer())
    decoding = Decoding(
        settings.max_new_tokens,
        Sampling(settings.temperature, settings.top_k, settings.top_p),
        (chat.terminator_id,),
    )
    return OpenRun(run, open_pair(run, device.value, dtype.value), chat, settings.system, decoding, settings.seed)
