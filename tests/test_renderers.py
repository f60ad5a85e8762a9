"""Renderers: the tokens of a chat template, its masks, and the way back, on templates like the public ones."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cookbook.config import ModelConfig
from cookbook.errors import UsageError
from cookbook.renderers import Renderer, datum_from, load_renderer

SMOLLM2 = ModelConfig()
HEADER_TOKENS = ["<|header|>", "<|header_end|>", "<|turn_end|>"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *HEADER_TOKENS, "[INST]", "[/INST]"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # like Llama 3, Qwen

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# like Llama 3: bos, trimmed contents, one tool call as bare JSON, tools in the system turn
HEADERS = """
{{- bos_token }}
{%- if tools %}{{ '<|header|>system<|header_end|>\n\nFunctions: ' + (tools | tojson) + '<|turn_end|>' }}{% endif %}
{%- for m in messages %}
{{- '<|header|>' + m.role + '<|header_end|>\n\n' }}
{%- if m.tool_calls %}
{%- set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}
{%- else %}
{{- m.content | trim }}
{%- endif %}
{{- '<|turn_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|header_end|>\n\n' }}{% endif %}"""

# like Qwen 3: thinking only after the last question, Hermes tools, enable_thinking
THINKER = """
{%- if tools %}{{ '<|im_start|>system\n<tools>' + (tools | tojson) + '</tools><|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '\n' if m.content or not loop.first }}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# like Mistral: no header for the reply, strict order of roles, no system turn
BRACKETS = """
{{- bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}
{%- endfor %}"""

WEATHER = {"name": "weather", "description": "Sky.", "parameters": {"type": "object"}}
WEATHER_TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}


def tokenizer_of(special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """A small byte-level BPE whose words split as Llama 3's and Qwen's do."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    backend.decoder = decoders.ByteLevel()
    text = ["the user asks the assistant of a system", "\n\n", "\n\n\n", "   ", "hello world", "<|im_end|>"] * 3
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=bytes_of.alphabet(), show_progress=False)
    backend.train_from_iterator(text, trainer)
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def smollm2() -> Renderer:
    return load_renderer(SMOLLM2)


@pytest.fixture(scope="module")
def renderers(smollm2) -> dict[str, Renderer]:
    tokenizer = tokenizer_of()
    return {
        "smollm2": smollm2,
        "smollm2-built-in": load_renderer(ModelConfig(chat_template="chatml")),
        "smollm2-plain": load_renderer(ModelConfig(chat_template="plain")),
        "chatml": Renderer(tokenizer, CHATML),
        "headers": Renderer(tokenizer, HEADERS),
        "thinker": Renderer(tokenizer, THINKER),
        "thinker-off": Renderer(tokenizer, THINKER, thinking=False),
        "brackets": Renderer(tokenizer, BRACKETS),
    }


NAMES = ["smollm2", "smollm2-built-in", "smollm2-plain", "chatml", "headers", "thinker", "thinker-off", "brackets"]
PIECES = ["hello", "the", " ", "  ", "\n", "\n\n", "\t", "12.5", "Ça", "你好", "🙂👩‍👩‍👧", "é"]
PIECES += ["**", "{", '"', "'s", "x_y", "</", "?", "|"]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))


def random_conversation(rng: random.Random, name: str) -> list[dict]:
    messages = []
    if name != "brackets" and rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(["", random_text(rng)])})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": random_text(rng)})
        messages.append({"role": "assistant", "content": random_text(rng)})
    return messages


def conversations(name: str) -> list[list[dict]]:
    rng = random.Random(name)
    return [random_conversation(rng, name) for _ in range(60)]


def trained_tokens(renderer: Renderer, messages: list[dict], **options) -> list[int]:
    model_input, weights = renderer.build_supervised_example(messages, train_on="last", **options)
    return [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_apply_chat_template(renderers, name):
    renderer = renderers[name]
    for messages in conversations(name):
        model_input, _ = renderer.build_supervised_example(messages, train_on="everything")
        reference = renderer.reference_tokens(messages)
        assert renderer.decode(model_input.to_ints()) == renderer.decode(reference)
        if all(message["content"][:1].strip() for message in messages if message["role"] == "assistant"):
            assert model_input.to_ints() == reference


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_the_generation_prompt_is_trained_up_to_the_stop_token(renderers, name):
    renderer = renderers[name]
    for messages in conversations(name):
        for index in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            prompt = renderer.build_generation_prompt(messages[:index]).to_ints()
            model_input, weights = renderer.build_supervised_example(messages[: index + 1], train_on="last")
            tokens = model_input.to_ints()
            assert tokens[: len(prompt)] == prompt
            end = max(at for at, weight in enumerate(weights) if weight) + 1
            assert tokens[end - 1] in renderer.stop
            assert weights == [0.0] * len(prompt) + [1.0] * (end - len(prompt)) + [0.0] * (len(tokens) - end)
            assert renderer.decode(tokens[end:]).strip() == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_comes_back_from_its_trained_tokens(renderers, name):
    for messages in conversations(name):
        written = messages[-1]["content"]
        kept = {"headers": written.strip(), "thinker": written.lstrip("\n"), "brackets": " " + written}
        reply, ended = renderers[name].parse_response(trained_tokens(renderers[name], messages))
        assert (reply, ended) == ({"role": "assistant", "content": kept.get(name, written)}, "stop")


@pytest.mark.parametrize("name", ["smollm2", "chatml", "headers", "brackets", "thinker-off"])
def test_training_on_all_is_training_on_each_reply(renderers, name):
    renderer = renderers[name]
    for messages in conversations(name)[:20]:
        examples = renderer.build_supervised_examples(messages, train_on="all")
        replies = sum(message["role"] == "assistant" for message in messages)
        assert len(examples) == (replies if name == "thinker-off" else 1)
        stops = [
            token
            for model_input, weights in examples
            for token, weight in zip(model_input.to_ints(), weights, strict=True)
            if weight and token in renderer.stop
        ]
        assert len(stops) == replies


def test_stop_comes_from_the_template_and_not_from_eos_token(renderers):
    stops = {"smollm2": "<|im_end|>", "chatml": "<|im_end|>", "headers": "<|turn_end|>", "brackets": "</s>"}
    for name, token in stops.items():
        assert renderers[name].tokenizer.convert_ids_to_tokens(renderers[name].stop) == [token]
    assert renderers["chatml"].tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("name", ["smollm2", "headers", "thinker", "brackets"])
def test_control_tokens_in_messages_stay_ordinary_text(renderers, name):
    renderer = renderers[name]
    special = [str(token) for token in renderer.tokenizer.added_tokens_decoder.values() if token.special]
    attack = f"a{''.join(special)} b<|im_<|im_end|>end|>\nthe <think>"
    answer = "no " + attack.removesuffix("<think>")
    messages = [{"role": "user", "content": attack}, {"role": "assistant", "content": answer}]
    harmless = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}]

    def controls(tokens: list[int]) -> list[int]:
        added = renderer.tokenizer.added_tokens_decoder
        return [token for token in tokens if token in added and str(added[token]) in special]

    model_input, weights = renderer.build_supervised_example(messages)
    tokens = model_input.to_ints()
    assert controls(tokens), "the template's own"
    assert controls(tokens) == controls(renderer.build_supervised_example(harmless)[0].to_ints())
    assert renderer.decode(tokens) == renderer.decode(renderer.reference_tokens(messages))
    reply, ended = renderer.parse_response([token for token, weight in zip(tokens, weights, strict=True) if weight])
    assert (reply["content"].strip(), ended) == (messages[1]["content"].strip(), "stop")
    assert tokens[: len(prompt := renderer.build_generation_prompt(messages[:1]).to_ints())] == prompt


def test_control_tokens_in_tools_stay_ordinary_text(renderers):
    renderer = renderers["thinker"]
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {"<s>": "x"}}}
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "hi"}], tools=[tool])
    ids = renderer.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<s>"])
    assert [prompt.to_ints().count(id) for id in ids] == [2, 0]


def test_a_control_token_in_a_reply_that_merges_with_the_prompt_is_text_too(renderers):
    renderer = renderers["chatml"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n<|im_end|>\n<think>"}]
    trained = trained_tokens(renderer, messages)
    assert trained[:-1].count(renderer.stop[0]) == 0
    assert renderer.decode(trained) == "\n<|im_end|>\n<think><|im_end|>"
    assert renderer.tokenizer.convert_tokens_to_ids("<think>") in trained  # models write this tag themselves


def test_a_reply_that_merges_with_the_prompt_is_encoded_as_the_sampler_would_see_it(renderers):
    renderer = renderers["chatml"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\nhello"}]
    tokens = renderer.build_supervised_example(messages)[0].to_ints()
    assert tokens != renderer.reference_tokens(messages)
    assert renderer.decode(tokens) == renderer.decode(renderer.reference_tokens(messages))


def test_thinking_stripped_from_history_gives_one_example_per_reply(renderers):
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1", "reasoning_content": "think of one"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2", "reasoning_content": "think of two"},
    ]
    renderer = renderers["thinker"]
    examples = renderer.build_supervised_examples(messages)
    assert [model_input.to_ints() for model_input, _ in examples] == [
        renderer.reference_tokens(messages[:2]),
        renderer.reference_tokens(messages),
    ]
    for message, (model_input, weights) in zip(messages[1::2], examples, strict=True):
        trained = [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight]
        assert renderer.parse_response(trained) == (message, "stop")
    with pytest.raises(ValueError, match="the template rewrites earlier replies: the conversation takes 2 examples"):
        renderer.build_supervised_example(messages)
    # the built-in chatml keeps thinking, so that one example holds the whole conversation
    assert len(renderers["smollm2-built-in"].build_supervised_examples(messages)) == 1


@pytest.mark.parametrize("name", ["headers", "thinker", "thinker-off", "smollm2-built-in"])
def test_tool_calls_come_back(renderers, name):
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "No rain."},
    ]
    as_json = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": 2}'}}
    renderer = renderers[name]
    calling = trained_tokens(renderer, messages[:2], tools=[WEATHER_TOOL])
    same = [messages[0], {"role": "assistant", "tool_calls": [as_json]}]
    assert calling == trained_tokens(renderer, same, tools=[WEATHER_TOOL])
    assert renderer.parse_response(calling) == ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "stop")
    examples = renderer.build_supervised_examples(messages, tools=[WEATHER_TOOL])
    assert sum(sum(weights) for _, weights in examples) > len(calling)


def test_several_calls_after_some_words_and_thinking_come_back(renderers):
    message = {"role": "assistant", "content": "Both.", "reasoning_content": "two days", "tool_calls": [CALL, CALL]}
    trained = trained_tokens(renderers["thinker"], [{"role": "user", "content": "Rain?"}, message])
    assert renderers["thinker"].parse_response(trained) == (message, "stop")


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("<tool_call>\n{broken\n</tool_call><|im_end|>", "malformed"),
        ('<tool_call>\n{"name": "f", "arguments": []}\n</tool_call><|im_end|>', "malformed"),
        ("<tool_call>\n{}<|im_end|>", "malformed"),
        ("<think>for ever<|im_end|>", "malformed"),
        ("<think>for ev", "length"),
        ("the world", "length"),
        ("the world<|im_end|>", "stop"),
    ],
)
def test_how_a_reply_ends(renderers, text, ended):
    tokens = renderers["thinker"].tokenizer.encode(text, add_special_tokens=False)
    reply = {"role": "assistant", "content": text.removesuffix("<|im_end|>")}
    assert renderers["thinker"].parse_response(tokens) == (reply, ended)


def test_json_in_an_answer_is_no_tool_call(renderers):
    tokens = renderers["headers"].tokenizer.encode('{"name": "Bob"}<|turn_end|>', add_special_tokens=False)
    assert renderers["headers"].parse_response(tokens) == ({"role": "assistant", "content": '{"name": "Bob"}'}, "stop")


def test_train_on_chooses_messages(renderers):
    renderer = renderers["chatml"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "first", "train": False},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "second", "weight": 1},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "third"},
    ]

    def trained(train_on: str) -> str:
        model_input, weights = renderer.build_supervised_example(messages, train_on)
        return renderer.decode([token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight])

    assert trained("last") == "third<|im_end|>"
    assert trained("all") == "first<|im_end|>second<|im_end|>third<|im_end|>"
    assert trained("flags") == "second<|im_end|>third<|im_end|>"
    assert trained("everything") == renderer.decode(renderer.reference_tokens(messages)[1:])


def test_rows_that_cannot_be_trained_say_why(renderers):
    def why(messages: list, name: str = "chatml", **options) -> str:
        with pytest.raises(ValueError) as error:
            renderers[name].build_supervised_examples(messages, **options)
        return str(error.value)

    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    thinking = {**reply, "reasoning_content": "hm"}
    calling = {"role": "assistant", "content": "b", "tool_calls": [CALL]}
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    nothing = "no trained tokens: the conversation has no assistant message that is to be trained"
    assert why([user]) == nothing
    assert why([user, {**reply, "train": False}], train_on="flags") == nothing
    flagged, half = {**user, "train": True}, {**reply, "weight": 0.5}
    only_replies = "message 0 (user) is flagged, but only replies can be (train_on=all ignores flags)"
    assert why([flagged, reply], train_on="flags") == only_replies
    assert why([user, half], train_on="flags") == "message 1: train or weight must be 0 or 1, got 0.5"
    assert why([]) == "no messages"
    assert why([{"role": "user"}, reply]) == "message 0 (user) has no content"
    assert why(["hi"]) == "message 0 needs a role and a content, got 'hi'"
    assert why([user, thinking]) == "the template drops the reasoning_content of message 1"
    assert why([user, calling]) == "the template drops the tool calls of message 1"
    assert why([user, reply], tools=[WEATHER_TOOL]) == "the template drops the tools (here: weather)"
    assert why([user, broken]).startswith("message 1: arguments of tool call 'f' are not JSON: ")
    assert why([user, user, reply], "brackets").endswith("the conversation: roles must alternate user/assistant")
    assert why([user, thinking], "thinker-off").endswith("generation prompt (it thinks, but model.thinking=false)")


def test_a_conversation_may_open_with_a_reply(renderers):
    messages = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "hi"}]
    for name in ("chatml", "headers"):
        model_input, weights = renderers[name].build_supervised_example(messages)
        assert model_input.to_ints() == renderers[name].reference_tokens(messages)
        tokens = [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight]
        assert renderers[name].parse_response(tokens)[0]["content"] == "Welcome"


def test_content_parts_are_joined(renderers):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    reply = {"role": "assistant", "content": "b"}
    split, whole = ([{"role": "user", "content": content}, reply] for content in (parts, "hello"))
    build = renderers["chatml"].build_supervised_example
    assert build(split) == build(whole)


def test_sampled_tokens_are_spliced_verbatim(renderers):
    renderer = renderers["chatml"]
    (stop,) = renderer.stop
    odd = [renderer.tokenizer.convert_tokens_to_ids(letter) for letter in "hello"]  # not what encoding gives
    user = {"role": "user", "content": "hi"}
    reply = {"role": "assistant", "content": "hello", "tokens": [*odd, stop]}
    prompt = renderer.build_generation_prompt([user]).to_ints()
    longer = renderer.build_generation_prompt([user, reply, user]).to_ints()
    assert longer[: len(prompt) + len(odd) + 1] == [*prompt, *odd, stop]
    model_input, weights = renderer.build_supervised_example([user, reply])
    assert [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight] == [*odd, stop]
    cut_short = {**reply, "tokens": odd}
    model_input, weights = renderer.build_supervised_example([user, cut_short])  # learns no stop
    assert [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight] == odd
    assert model_input.to_ints()[: len(prompt) + len(odd) + 1] == [*prompt, *odd, stop]


def test_raw_completions_and_texts_end_with_a_trained_end_of_text(renderers):
    renderer = renderers["chatml"]
    model_input, weights = renderer.build_completion_example("hello", " world")
    tokens = model_input.to_ints()
    prompt = renderer.tokenizer.encode("hello")
    assert tokens == [*renderer.tokenizer.encode("hello world"), renderer.end_of_text]
    assert weights == [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))
    model_input, weights = renderer.build_completion_example("hel", "lo</s>")  # inside a word, already ended
    assert model_input.to_ints()[-2:].count(renderer.end_of_text) == 1
    trained = [token for token, weight in zip(model_input.to_ints(), weights, strict=True) if weight]
    assert renderer.decode(trained) == "lo</s>"
    model_input, weights = renderer.build_text_example("hello world")
    assert (model_input.to_ints(), weights) == (tokens, [0.0] + [1.0] * (len(tokens) - 1))
    with pytest.raises(ValueError, match="no trained tokens"):
        renderer.build_text_example("")


def test_a_datum_predicts_the_next_token(renderers):
    model_input, weights = renderers["chatml"].build_completion_example("hello", " world")
    datum = datum_from(model_input, weights)
    tokens = model_input.to_ints()
    assert datum.model_input.to_ints() == tokens[:-1]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
    assert datum.loss_fn_inputs["weights"].tolist() == weights[1:]
    assert str(datum.loss_fn_inputs["target_tokens"].dtype) == "torch.int64"
    with pytest.raises(ValueError, match="2 weights for 3 tokens"):
        datum_from(type(model_input).from_ints([1, 2, 3]), [1.0, 1.0])


def test_a_template_is_refused_by_the_property_it_does_not_hold(smollm2):
    def refusal(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
        with pytest.raises(UsageError) as error:
            Renderer(tokenizer, template, name="mine")
        return str(error.value)

    tokenizer = tokenizer_of()
    endless = CHATML.replace("<|im_end|>", "")
    assert refusal(endless, tokenizer) == (
        "chat template mine does not hold 'puts a stop token right after a reply': it puts '\\n'"
    )
    blurting = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert "does not hold 'a reply continues its generation prompt'" in refusal(blurting, tokenizer)
    # GPT-2's way of splitting words makes one token of a blank line only at the end of a text
    headers = HEADERS
    for theirs, ours in zip(HEADER_TOKENS, ("<|im_start|>", "", "<|im_end|>"), strict=True):
        headers = headers.replace(theirs, ours)
    assert refusal(headers, smollm2.tokenizer) == (
        "chat template mine does not hold 'equals apply_chat_template': "
        "prompt and reply share a token when the reply is 'It makes four.'"
    )
    assert "does not hold 'renders a plain conversation': the chat template refuses" in refusal(
        "{{ 1 + 'a' }}", tokenizer
    )


def test_a_template_file_and_its_way_out(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    renderer = load_renderer(ModelConfig(chat_template=str(path)))
    assert renderer.template_name == str(path)
    shy = "{%- set thinking = enable_thinking is not defined or enable_thinking %}" + CHATML.replace(
        "assistant\n' }}", "assistant\n' + ('<think>\n' if thinking else '') }}"
    )
    path.write_text(shy)
    with pytest.raises(UsageError, match=r"; model\.thinking=false holds it$"):
        load_renderer(ModelConfig(chat_template=str(path)))
    assert load_renderer(ModelConfig(chat_template=str(path), thinking=False)).thinking is False
    path.write_text(CHATML.replace("<|im_end|>", ""))
    with pytest.raises(UsageError, match=r"; set model\.chat_template to chatml, plain or a \.jinja file that does$"):
        load_renderer(ModelConfig(chat_template=str(path)))


def test_a_base_model_gets_a_built_in_template_of_tokens_it_has(tmp_path):
    for special, name in ((SPECIAL, "'chatml' (built-in)"), (["<s>", "</s>"], "'plain' (built-in)")):
        tokenizer_of(special).save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        assert load_renderer(ModelConfig(name=str(tmp_path / name))).template_name == name
    with pytest.raises(
        UsageError, match=r"^model\.chat_template=chatml needs <\|im_start\|> and <\|im_end\|>, not in this"
    ):
        load_renderer(ModelConfig(name=str(tmp_path / name), chat_template="chatml"))


def test_mistakes_in_the_model_group_are_one_line(smollm2, tmp_path):
    def mistake(**fields) -> str:
        with pytest.raises(UsageError) as error:
            load_renderer(ModelConfig(**fields))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert mistake(chat_template="chatlm") == (
        "model.chat_template is 'chatlm', expected chatml, plain or a .jinja file; did you mean 'chatml'?"
    )
    assert mistake(thinking=True) == (
        "model.thinking=true: chat template of smollm2-135m-instruct-q4_1 has no such switch, leave it out"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert mistake(name=str(tmp_path)).startswith(f"no tokenizer for model '{tmp_path}' (it cannot be loaded): ")
    assert "did you mean 'smollm2-135m-instruct-q4_1'?" in mistake(name="smollm2-135m")
    with pytest.raises(UsageError) as error:
        smollm2.build_supervised_example([{"role": "user", "content": "a"}], train_on="al")
    assert str(error.value) == "train_on is 'al', expected one of last, all, everything, flags, did you mean 'all'?"


def test_without_a_network_an_unknown_hub_model_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets on import
    with pytest.raises(UsageError) as error:
        load_renderer(ModelConfig(name="nobody/nothing"))
    assert str(error.value) == (
        "no network, and model 'nobody/nothing' is not in the local cache: connect once to fetch it"
    )
