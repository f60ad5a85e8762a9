"""Messages to tokens and back, through any Hugging Face chat template that holds three properties, checked on loading.

1. Tokens equal `tokenizer.apply_chat_template`; control tokens inside messages stay ordinary text.
2. The generation prompt is a prefix of the supervised example.
3. The stop token is the one the template puts after a reply (not `eos_token`), and it is trained.

Where a reply's first characters would merge with the prompt's last token (a reply that starts with a newline), 2 wins
over 1: the reply is encoded by itself, as a sampler that saw the prompt would have written it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cookbook.chat_templates import choose_template, load_tokenizer
from cookbook.config import ModelConfig
from cookbook.conversation import Conversation, Span
from cookbook.encoding import TextEncoder
from cookbook.errors import UsageError
from cookbook.messages import Json, Message, Tools
from cookbook.replies import Malformed, parse_reply
from cookbook.template_check import check, learn
from cookbook.token_texts import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from core import Datum, ModelInput

Weighted: TypeAlias = "tuple[ModelInput, list[float]]"  # weights[i] is 1.0 where token i is trained
Ended: TypeAlias = Literal["stop", "length", "malformed"]

TRAIN_ON = ("last", "all", "everything", "flags")


class Renderer:
    """A tokenizer with a checked chat template. `stop` are the tokens that end a reply.

    `template` is Jinja source (None: the tokenizer's own), `name` what errors call it. Raises UsageError for a template
    that cannot hold one of the three properties.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str | None = None,
        *,
        name: str = "the tokenizer's own",
        thinking: bool | None = None,
    ):
        self.tokenizer = tokenizer
        self.template_name = name
        self.template = template
        self.thinking = thinking
        self._variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        self.facts = learn(self)
        self.stop = list(self.facts.stop)
        self.stop_texts = [str(tokenizer.added_tokens_decoder[token]) for token in self.stop]
        self.encoder = TextEncoder(tokenizer, self.facts.structural)
        self.texts_of = TokenTexts(self.decode)
        check(self)

    def build_generation_prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> ModelInput:
        """The tokens after which the model writes the next reply. Raises ValueError if the template refuses."""
        from core import ModelInput

        conversation = Conversation(self, messages, tools)
        text = conversation.prompt(len(messages))
        conversation.check_complete(text)
        tokens, _ = conversation.encode(text)
        return ModelInput.from_ints(tokens)

    def build_supervised_example(
        self, messages: Sequence[Message], train_on: str = "all", tools: Tools | None = None
    ) -> Weighted:
        """The one example of a conversation. Raises ValueError when there are several."""
        examples = self.build_supervised_examples(messages, train_on, tools)
        if len(examples) > 1:
            raise ValueError(
                f"the template rewrites earlier replies: the conversation takes {len(examples)} examples, "
                "use build_supervised_examples or train_on='last'"
            )
        return examples[0]

    def build_supervised_examples(
        self, messages: Sequence[Message], train_on: str = "all", tools: Tools | None = None
    ) -> list[Weighted]:
        """One example, or one per trained reply where the template rewrites earlier replies (strips their thinking).

        Trained of a reply: what follows its generation prompt, up to and with the stop token. Raises ValueError for a
        conversation that has no trained tokens or that the template refuses.
        """
        conversation = Conversation(self, messages, tools)
        text = conversation.text(len(messages))
        conversation.check_complete(text)
        if train_on == "everything":
            tokens, _ = conversation.encode(text)
            return [_weighted(tokens, [(1, len(tokens))])]
        trained = _trained_replies(messages, train_on)
        if all(text.startswith(conversation.reply(index)) for index in trained):
            return [_weighted(*conversation.encode(text, trained))]
        return [_weighted(*conversation.encode(conversation.text(index + 1), [index])) for index in trained]

    def build_completion_example(self, prompt: str, completion: str) -> Weighted:
        """Raw text without template, the completion and an end-of-text token trained. Control tokens in it are kept."""
        start = self._raw(prompt)
        tokens = self._raw(prompt + completion)
        if tokens[: len(start)] != start:  # a token straddles the border
            tokens = start + self.tokenizer.encode(completion, add_special_tokens=False)
        if tokens[-1:] != [self.end_of_text]:
            tokens.append(self.end_of_text)
        return _weighted(tokens, [(max(1, len(start)), len(tokens))])

    def build_text_example(self, text: str) -> Weighted:
        """Raw text and an end-of-text token; every token but the first is trained."""
        return self.build_completion_example("", text)

    def build_completion_prompt(self, prompt: str) -> ModelInput:
        """The tokens of a raw text without template, to be gone on from; the reply ends with `end_of_text`."""
        from core import ModelInput

        return ModelInput.from_ints(self._raw(prompt))

    def parse_response(self, tokens: Sequence[int]) -> tuple[dict[str, Json], Ended]:
        """The message of sampled `tokens` and how it ended; a malformed reply keeps its whole text as content."""
        end = next((index for index, token in enumerate(tokens) if token in self.stop), len(tokens))
        text = self.decode(tokens[:end])
        ended: Ended = "stop" if end < len(tokens) else "length"
        try:
            return parse_reply(text, in_thinking=self.facts.in_thinking, tool_style=self.facts.tool_style), ended
        except Malformed:
            return {"role": "assistant", "content": text}, "malformed" if ended == "stop" else "length"

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[Message], tools: Json, *, prompt: bool) -> str:
        """The template's text; `prompt` adds the generation prompt. Raises ValueError with the template's own words."""
        from jinja2 import TemplateError

        try:
            return self._apply(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {str(error).splitlines()[0]}") from error

    def reference_tokens(self, messages: Sequence[Message], tools: Json = None) -> list[int]:
        """What `tokenizer.apply_chat_template` makes of the messages."""
        return self._apply(messages, tools=tools, tokenize=True, return_dict=False)

    def _apply(self, messages: Json, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **self._variables, **options)

    @property
    def end_of_text(self) -> int:
        """The token after a raw text: the tokenizer's `eos_token`, else the template's stop token."""
        eos: Any = self.tokenizer.eos_token_id
        return self.stop[0] if eos is None else eos

    def _raw(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)  # with the BOS of tokenizers that put one, but not their EOS
        ends = tokens[-1:] == [self.end_of_text] and not text.endswith(str(self.tokenizer.eos_token))
        return tokens[:-1] if ends and len(tokens) > 1 else tokens


def _trained_replies(messages: Sequence[Message], train_on: str) -> list[int]:
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        replies = replies[-1:]
    elif train_on == "flags":
        flags = {index: _flag(index, message) for index, message in enumerate(messages)}
        others = [index for index, flag in flags.items() if flag and index not in replies]
        if others:
            flagged = f"message {others[0]} ({messages[others[0]]['role']}) is flagged"
            raise ValueError(f"{flagged}, but only replies can be (train_on=all ignores flags)")
        replies = [index for index in replies if flags[index] is not False]
    elif train_on != "all":
        close = difflib.get_close_matches(train_on, TRAIN_ON, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"train_on is '{train_on}', expected one of {', '.join(TRAIN_ON)}{hint}")
    if not replies:
        raise ValueError("no trained tokens: the conversation has no assistant message that is to be trained")
    return replies


def _flag(index: int, message: Message) -> bool | None:
    """`train` or `weight` of a message; None: not given, and a reply is then trained."""
    flag = message.get("train") if message.get("train") is not None else message.get("weight")
    if flag not in (None, 0, 1):
        raise ValueError(f"message {index}: train or weight must be 0 or 1, got {flag!r}")
    return None if flag is None else bool(flag)


def _weighted(tokens: list[int], spans: Sequence[Span]) -> Weighted:
    from core import ModelInput

    weights = [0.0] * len(tokens)
    for start, end in spans:
        weights[start:end] = [1.0] * (end - start)
    if not any(weights[1:]):
        raise ValueError(f"no trained tokens among {len(tokens)}")
    return ModelInput.from_ints(tokens), weights


def datum_from(model_input: ModelInput, weights: Sequence[float]) -> Datum:
    """The datum of N tokens: N - 1 inputs, and targets and weights moved by one. weights[i] belongs to token i."""
    import torch

    from core import Datum, ModelInput

    tokens = model_input.to_ints()
    if len(weights) != len(tokens):
        raise ValueError(f"{len(weights)} weights for {len(tokens)} tokens")
    targets = torch.tensor(tokens[1:], dtype=torch.int64)
    shifted = torch.tensor(weights[1:], dtype=torch.float32)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets, "weights": shifted})


def load_renderer(model: ModelConfig) -> Renderer:
    """The tokenizer of `model` with the chat template asked for. Raises UsageError."""
    tokenizer = load_tokenizer(model.name)
    name, template = choose_template(tokenizer, model)
    source = template or tokenizer.get_chat_template()
    if model.thinking is not None and "enable_thinking" not in source:
        thinking = str(model.thinking).lower()
        raise UsageError(f"model.thinking={thinking}: chat template {name} has no such switch, leave it out")
    try:
        return Renderer(tokenizer, template, name=name, thinking=model.thinking)
    except UsageError as error:
        raise UsageError(f"{error}; {_way_out(tokenizer, template, source, model)}") from error


def _way_out(tokenizer: PreTrainedTokenizerFast, template: str | None, source: str, model: ModelConfig) -> str:
    """What to set instead of a template that was refused."""
    if "enable_thinking" in source:
        for thinking in (value for value in (True, False) if value is not model.thinking):
            try:
                Renderer(tokenizer, template, thinking=thinking)
            except UsageError:
                continue
            return f"model.thinking={str(thinking).lower()} holds it"
    return "set model.chat_template to chatml, plain or a .jinja file that does"
