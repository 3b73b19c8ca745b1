"""Rows of the recipe: pieces of two to four words of each line of text.txt, and the same letters backwards."""


def pieces(row):
    words = row["text"].lower().strip(" .").split()
    texts = [" ".join(words[i : i + n]) for n in (2, 3, 4) for i in range(len(words) - n + 1)]
    return [{"prompt": text, "answer": text[::-1]} for text in texts]
