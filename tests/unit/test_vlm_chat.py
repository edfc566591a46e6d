import pytest
from transformers import PreTrainedTokenizer

from diffenc.errors import ConfigError, PromptError
from diffenc.mllm import IGNORE_ID, IMAGE_ID, Chat
from vlm_builders import TEMPLATE, tiny_lm_tokenizer

TURNS = [
    {"from": "human", "value": "<image>\nwhat colour?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "and <image> here?"},
    {"from": "gpt", "value": "two <unknown> blues"},
]
V1 = (
    "<bos>A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nwhat "
    "colour? ASSISTANT: red<eos>USER: and <image> here? ASSISTANT: two <unknown> blues<eos>"
)
TEXTS = {
    "chat": "<bos><|user|><image>\nwhat colour?\n<|assistant|>red<eos><|user|>and <image> here?\n"
    "<|assistant|>two <unknown> blues<eos>",
    "v1": V1,
    "plain": "<bos><image>red<eos><image>two <unknown> blues<eos>",
}
ANSWERS = {
    "chat": ["red<eos>", "two <unknown> blues<eos>"],
    "v1": [" red<eos>", " two <unknown> blues<eos>"],
    "plain": ["red<eos>", "two <unknown> blues<eos>"],
}


def read(tokenizer, ids):
    """Text of ids, letter by letter, with pictures."""
    return "".join("<image>" if i == IMAGE_ID else tokenizer.decode([i]) for i in ids)


@pytest.mark.parametrize("template", ["chat", "v1", "plain"])
def test_a_conversation_is_written_as_the_template_says_and_answers_alone_are_learnt(template):
    tokenizer = tiny_lm_tokenizer()
    encoded = Chat(tokenizer, template).encode(TURNS)
    assert read(tokenizer, encoded.input_ids) == TEXTS[template]
    runs, before = [], IGNORE_ID
    for label in encoded.labels:
        if label != IGNORE_ID:
            if before == IGNORE_ID:
                runs.append([])
            runs[-1].append(label)
        before = label
    if template == "plain":  # a picture stands between, which is not learnt
        assert encoded.num_images == 2
    assert [read(tokenizer, run) for run in runs] == ANSWERS[template]
    learnt = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label >= 0]
    assert learnt == [label for label in encoded.labels if label >= 0]


@pytest.mark.parametrize("template", ["chat", "v1", "plain"])
def test_what_is_asked_is_the_beginning_of_what_was_learnt(template):
    chat = Chat(tiny_lm_tokenizer(), template)
    asked = chat.encode(TURNS[:3])
    assert set(asked.labels[asked.labels.index(2) + 1 if template != "plain" else -1 :]) <= {
        IGNORE_ID
    }
    whole = chat.encode(TURNS)
    assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert whole.labels[len(asked.input_ids)] != IGNORE_ID


def test_turns_of_v1_are_separated_as_in_llava():
    def llava(system, messages, seps=(" ", "<eos>")):
        """`SeparatorStyle.TWO` of LLaVA's `conversation.py`."""
        text = system + seps[0]
        for index, (role, message) in enumerate(messages):
            text += f"{role}: {message}{seps[index % 2]}" if message else f"{role}:"
        return text

    chat = Chat(tiny_lm_tokenizer(), "v1", system="be brief")
    roles = {"human": "USER", "gpt": "ASSISTANT"}
    for count in (1, 2, 3, 4):
        turns = [(roles[turn["from"]], turn["value"]) for turn in TURNS[:count]]
        asked_for = [("ASSISTANT", None)] if count % 2 else []
        assert chat.text(TURNS[:count]) == "<bos>" + llava("be brief", turns + asked_for)


def test_without_a_chat_template_llavas_own_is_used_with_a_warning():
    with pytest.warns(UserWarning, match="no chat template"):
        chat = Chat(tiny_lm_tokenizer(template=None))
    assert chat.template == "v1"
    assert Chat(tiny_lm_tokenizer()).template == "chat"
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(tiny_lm_tokenizer(template=None), "chat")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
    with pytest.raises(ConfigError, match="changes earlier turns"):
        Chat(tiny_lm_tokenizer(template=rewriting)).encode(TURNS)
    refusing = "{{ raise_exception('never') }}"
    with pytest.raises(ConfigError, match="never"):
        Chat(tiny_lm_tokenizer(template=refusing)).encode(TURNS)


def test_a_system_message_comes_first():
    tokenizer = tiny_lm_tokenizer()
    encoded = Chat(tokenizer, "chat", system="be brief").encode(TURNS[:1])
    assert read(tokenizer, encoded.input_ids).startswith("<bos><|system|>be brief\n<|user|>")


def test_a_system_message_that_the_template_leaves_out_is_refused():
    deaf = tiny_lm_tokenizer(template=TEMPLATE.replace("<|system|>{{ m['content'] }}", ""))
    for tokenizer, template in ((deaf, "chat"), (tiny_lm_tokenizer(), "plain")):
        Chat(tokenizer, template)
        with pytest.raises(ConfigError, match=f"'{template}' has no place for a system message"):
            Chat(tokenizer, template, system="be brief")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "one turn or more"),
        (TURNS[1:], "take turns"),
        ([TURNS[0], TURNS[2]], "take turns"),
        ([{"from": "robot", "value": "x"}], "turn 0 must be"),
        ([{"from": "human", "value": 3}], "turn 0 must be"),
        ([TURNS[0], {"from": "gpt", "value": "<image>"}], "is an answer"),
    ],
    ids=str,
)
def test_other_conversations_are_refused(turns, message):
    with pytest.raises(PromptError, match=message):
        Chat(tiny_lm_tokenizer(), "v1").encode(turns)


def test_a_tokenizer_that_tells_no_places_is_refused():
    class Slow(PreTrainedTokenizer):
        def __init__(self):
            self.vocabulary = {}

        is_fast = False

    with pytest.raises(ConfigError, match="fast tokenizer"):
        Chat(object.__new__(Slow))


def test_long_samples_lose_their_end_but_never_part_of_a_picture():
    encoded = Chat(tiny_lm_tokenizer(), "plain").encode(TURNS)
    assert encoded.length(10) == len(encoded.input_ids) + 18
    cut = encoded.cut_to(26, 10)
    assert cut.length(10) == 26
    assert cut.input_ids == encoded.input_ids[: len(cut.input_ids)]
    assert encoded.cut_to(10_000, 10) == encoded
    with pytest.raises(ConfigError, match="2 pictures of 10 tokens"):
        encoded.cut_to(20, 10)
