"""The reward of the recipe: eight letters that can be spoken, because vowels and consonants take turns."""

from itertools import pairwise

LETTERS, VOWELS = set("abcdefghijklmnopqrstuvwxyz"), set("aeiou")


def speakable(prompt, completion):
    word = prompt + completion
    pairs = [(a, b) for a, b in pairwise(word) if {a, b} <= LETTERS]
    turns = sum((a in VOWELS) != (b in VOWELS) for a, b in pairs)
    return turns / 7 * len(set(word)) / len(word)  # the second factor: the share of letters that are not repeated
