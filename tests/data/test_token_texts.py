from rl.data.token_texts import TokenTexts
from rl.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("byte")


def test_pieces_are_the_text_and_a_character_of_several_tokens_belongs_to_the_last():
    ids = TOKENIZER.encode("a\u4e2d<b>", add_bos=False)
    pieces = TokenTexts(TOKENIZER)(ids)
    assert pieces == ["a", "", "", "\u4e2d", "<", "b", ">"]


def test_half_a_character_at_the_end_is_shown_and_special_tokens_are_text():
    ids = TOKENIZER.encode("a\u4e2d", add_bos=False)[:-1]
    pieces = TokenTexts(TOKENIZER)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=False)
    (piece,) = TokenTexts(TOKENIZER)([TOKENIZER.eos_ids[0]])
    assert piece == TOKENIZER.decode(TOKENIZER.eos_ids[:1], skip_special_tokens=False) != ""


def test_no_tokens_have_no_pieces():
    assert TokenTexts(TOKENIZER)([]) == []
