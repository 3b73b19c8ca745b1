"""Rows of the recipe: reasoning-gym's Countdown in few characters, `1 4 8=5:`, with the reward's columns."""


def short(row):
    numbers, target = sorted(row["metadata"]["numbers"]), row["metadata"]["target"]
    prompt = f"{' '.join(map(str, numbers))}={target}:"
    return {"prompt": prompt, "answer": row["answer"].replace(" ", ""), "nums": numbers, "target": target}
