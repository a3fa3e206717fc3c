"""``signbit chat``: a conversation in the terminal.

ctrl-C ends the answer, not the program; ctrl-D, or an empty line from a pipe's end, ends the program. In a pipe each
line is a message, and only the answers go to stdout, a line feed after each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from signbit import inference
from signbit.errors import SignbitError
from signbit.modules import set_activations
from signbit.safetensors_file import write_text
from signbit.serving.conversation import Conversation
from signbit.serving.prompts import Prompts, context_length
from signbit.serving.sampling import NotFiniteError, Sampling
from signbit.serving.wrapping import Wrapping, line_width

_HELP = """\
/reset          forget the conversation
/system TEXT    tell the model who it is, and begin again; without TEXT nobody
/save FILE      write the conversation as JSON
/help           this
/exit           leave; so does ctrl-D. ctrl-C stops an answer"""


def chat(
    model: str,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
) -> None:
    """Talk with MODEL in the terminal until the input ends. SignbitError if the model cannot be opened."""
    opened, tokenizer = inference.open_model(model, device=device, trust_remote_code=trust_remote_code)
    set_activations(opened, activations)
    prompts = Prompts(tokenizer, opened.config, context_length(opened.config, context))
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    conversation = Conversation(opened, tokenizer, prompts, sampling, max_tokens, system)
    Terminal(conversation, sys.stdin, sys.stdout).run(model)


class Terminal:
    """Reads lines, does what they say or has them answered."""

    def __init__(self, conversation: Conversation, source: TextIO, out: TextIO) -> None:
        self._conversation, self._source, self._out = conversation, source, out
        self._interactive = source.isatty()
        self._faint = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/save": self._save,
            "/system": self._system,
        }

    def run(self, model: str) -> None:
        if self._interactive:
            _edit_lines()
            self._note(f"{model}, {self._conversation.prompts.context} tokens of context; /help says what there is")
        if not self._conversation.prompts.has_template:
            self._note("the tokenizer has no chat template: messages are written as 'User: ...', 'Assistant: ...'")
        while (line := self._line()) is not None:
            command, _, rest = line.strip().partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command.startswith("/"):
                self._commands.get(command, self._unknown)(rest.strip())
            elif command:
                try:
                    self._answer(line.strip())
                except KeyboardInterrupt:  # a second one, while the first was dealt with
                    if not self._interactive:
                        raise

    def _line(self) -> str | None:
        """The next message, None at the end."""
        if not self._interactive:
            return self._source.readline() or None
        while True:
            try:
                return input("> ")
            except EOFError:
                self._note("")
                return None
            except KeyboardInterrupt:
                self._note("\n(ctrl-D or /exit leaves)")

    def _answer(self, text: str) -> None:
        pieces = self._conversation.ask(text)
        width = line_width(self._out)
        shown = self._out if width is None else Wrapping(self._out, width)
        begun = False
        try:
            for piece in pieces:
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                shown.write(printable(piece) if self._interactive else piece)
                self._out.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            if not self._interactive:
                raise
        except NotFiniteError:
            self._note("the model computed no finite probabilities for this: /reset begins again")
        except SignbitError as error:
            self._note(str(error))
            return
        turn = self._conversation.last
        self._out.write("\n")
        self._out.flush()
        if not self._interactive:
            return
        words = [f"{turn.tokens} tokens"]
        if turn.seconds > 0 and turn.tokens > 1:
            words.append(f"{(turn.tokens - 1) / turn.seconds:.1f} a second")
        if turn.finish != "stop":
            words.append("stopped" if turn.finish is None else "cut off at the limit")
        if turn.dropped:
            words.append(f"the context is full: {turn.dropped} old messages left out")
        self._note(", ".join(words))

    def _note(self, text: str) -> None:
        self._faint.print(Text(text, style="dim"))

    def _help(self, rest: str) -> None:
        self._note(_HELP)

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        self._note("a new conversation")

    def _system(self, rest: str) -> None:
        self._conversation.system = rest or None
        self._reset(rest)

    def _save(self, rest: str) -> None:
        if not rest:
            self._note("/save needs the name of a file")
            return
        conversation = self._conversation
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        text = json.dumps([*system, *conversation.messages], indent=2, ensure_ascii=False) + "\n"
        try:
            write_text(Path(rest).expanduser().resolve(), text)
        except OSError as error:
            self._note(f"{rest} cannot be written: {error.strerror}")
        else:
            self._note(f"{len(conversation.messages)} messages in {rest}")

    def _unknown(self, rest: str) -> None:
        self._note("there is no such command: /help says what there is")


def printable(text: str) -> str:
    """Without control characters: a model must not move the cursor or name the window."""
    return "".join(one if one in "\n\t" or one.isprintable() or not _controls(one) else "\ufffd" for one in text)


def _controls(character: str) -> bool:
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0


def _edit_lines() -> None:
    """Arrow keys, history and pasted lines as one message in ``input``, where Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
