"""Text out of tokens: whole characters only, stop texts, end tokens, chats."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flowspec.errors import UserError
from flowspec.text import Text, TextStream, check_same_tokens


@pytest.fixture
def tokenizer():
    """One token a byte: every other character of real text is broken in between."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(tokenizer, text, stop=()):
    stream, out = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text).ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return out, stream


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂 done", "a\n  b\t"])
def test_no_piece_holds_a_broken_character(tokenizer, text):
    out, stream = pieces(tokenizer, text)
    assert "".join(out) + stream.flush() == text == stream.text
    assert not any("\ufffd" in piece for piece in out)


@pytest.fixture
def sentencepiece():
    """As Llama-2's: a space is part of the word, bytes of characters it does not know come one by one."""
    vocab = {
        "<unk>": 0,
        **{f"<0x{b:02X}>": 1 + b for b in range(256)},
        "▁Hello": 257,
        "▁world": 258,
        "!": 259,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def test_words_that_begin_with_a_space_keep_it_behind_the_prompt(sentencepiece):
    stream = TextStream(sentencepiece, prompt=[257])
    assert [stream.push(258), stream.push(259)] == [" world", "!"]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_stream_without_a_failure(sentencepiece, seed):
    r = random.Random(seed)
    tokens = [r.choice([r.randrange(1, 257), 257, 258, 259]) for _ in range(30)]
    stream = TextStream(sentencepiece)
    text = "".join(stream.push(t) for t in [*tokens, 259])
    assert text.endswith("!") and text == stream.text, tokens


def test_a_character_cut_by_the_limit_is_not_shown(tokenizer):
    stream = TextStream(tokenizer)
    assert "".join(stream.push(t) for t in tokenizer.encode("né").ids[:2]) == "n"


@pytest.mark.parametrize(
    "text,stop,want",
    [
        ("one END two", ["END"], "one "),
        ("aab", ["ab"], "a"),
        ("x\n\ny", ["\n\n", "y"], "x"),
        ("END", ["END"], ""),
    ],
)
def test_nothing_at_or_after_a_stop_text_is_given(tokenizer, text, stop, want):
    out, stream = pieces(tokenizer, text, stop)
    assert stream.stopped and "".join(out) == want == stream.text


def test_what_only_looks_like_a_stop_text_is_given_in_the_end(tokenizer):
    out, stream = pieces(tokenizer, "one EN", ["END"])
    assert "".join(out) == "one " and stream.flush() == "EN" and not stream.stopped


def test_the_same_tokens_with_other_padding_are_the_same_vocabulary(tokenizer):
    check_same_tokens(tokenizer, tokenizer, "draft")
    vocabulary = json.loads(tokenizer.to_str())
    vocabulary["model"]["vocab"]["A"], vocabulary["model"]["vocab"]["B"] = (
        vocabulary["model"]["vocab"][c] for c in "BA"
    )
    other = Tokenizer.from_str(json.dumps(vocabulary))
    size, a, b = len(tokenizer.get_vocab()), *map(tokenizer.token_to_id, "AB")
    said = rf"of {size} and {size} tokens 2 differ, such as 'A', which is {a} in the target and {b} in the draft"
    with pytest.raises(UserError, match=rf"draft has another vocabulary.*: {said}"):
        check_same_tokens(tokenizer, other, "draft")


def test_a_token_that_only_one_vocabulary_has_is_named(tokenizer):
    more = Tokenizer.from_str(tokenizer.to_str())
    more.add_tokens(["<extra>"])
    size, number = len(tokenizer.get_vocab()), more.token_to_id("<extra>")
    for ours, theirs, counts, places in (
        (tokenizer, more, (size + 1, size), ("missing", number)),
        (more, tokenizer, (size, size + 1), (number, "missing")),
    ):
        with pytest.raises(UserError) as told:
            check_same_tokens(ours, theirs, "draft")
        assert "of {} and {} tokens 1 differ".format(*counts) in str(told.value)
        named = "'<extra>', which is {} in the target and {} in the draft".format(*places)
        assert named in str(told.value)


@pytest.mark.parametrize("eos,want", [(3, {3}), ([3, 4], {3, 4}), (None, set())])
def test_end_tokens_may_be_one_several_or_none(tokenizer, tmp_path, eos, want):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9 if eos else None}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert Text(tmp_path).eos == want


def test_a_chat_without_a_template_is_plain_turns(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)
    turns = [{"role": "user", "content": "Hi"}]
    assert text.decode(text.encode_chat(turns)) == "User: Hi\nAssistant:"


def test_a_chat_template_is_applied(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = Text(tmp_path)
    assert text.decode(text.encode_chat([{"role": "user", "content": "Hi"}])) == "<user>Hi<bot>"


TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ messages[0].content }}"
)


def test_a_chat_template_is_told_of_tools(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Text(tmp_path).chat_stops == ("\nUser:",)
    (tmp_path / "chat_template.jinja").write_text(TOOLS)
    text, turns = Text(tmp_path), [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert text.template == TOOLS and text.chat_stops == ()
    assert text.decode(text.encode_chat(turns)) == "Hi"
    assert text.decode(text.encode_chat(turns, tools)) == "[look]Hi"


def test_what_a_chat_template_raises_is_said(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["chat_template"] = "{{ raise_exception('turns must alternate') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="turns must alternate"):
        Text(tmp_path).encode_chat([{"role": "user", "content": "Hi"}])


def test_half_a_character_is_no_prompt(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not valid Unicode"):
        Text(tmp_path).encode("\ud800")


def test_the_stop_text_that_was_met_is_known(tokenizer):
    assert pieces(tokenizer, "one two", ["nothing", "two", "tw"])[1].met == "tw"
    assert pieces(tokenizer, "one two", ["three"])[1].met is None


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Text(tmp_path)
