"""A reward that costs nothing and is not constant, for completions that are numbers with spaces in between."""


def even_share(prompts, completions, **_):
    """Share of each completion's numbers that are even; 0 of an empty one."""
    shares = []
    for completion in completions:
        words = completion.split()
        shares.append(sum(word[-1] in "02468" for word in words) / max(len(words), 1))
    return shares
