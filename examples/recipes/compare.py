"""Train every method with the same seeds, and compare it with the first one, seed by seed."""

import argparse
import json
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits

from steer_optim import Steer

T95 = 4.303  # Student's t at 97.5% for three seeds
SEEDS = (0, 1, 2)


def weighted(main, factor=3):
    """The plain weighted sum, `factor * main + the others`, as a rule."""
    return Steer(main, gain=factor - 1, project="never", preserve_norm=False)


def compare(file, train, methods, **defaults):
    """Call `train(method, **settings)` for every method and seed; it returns numbers by name.

    Print the table, and write the numbers to `results/<name of the file>.json`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(file).parent / "results" / f"{Path(file).stem}.json")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    settings = vars(parser.parse_args())
    out = settings.pop("out")
    runs = {}
    for name, method in methods.items():
        found = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            found.append(train(method, **settings))
        runs[name] = {metric: [round(numbers[metric], 5) for numbers in found] for metric in found[0]}
    print(table(runs))
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        json.dumps({"torch": torch.__version__.split("+")[0], "settings": settings, "runs": runs}, indent=1) + "\n"
    )


def table(runs):
    """The mean of the first method, and the difference of every other from it with a 95% interval."""
    (base, first), *others = runs.items()
    rows = [["", *first], ["---"] * (1 + len(first)), [base, *(f"{mean(values):.2f}" for values in first.values())]]
    for name, run in others:
        cells = []
        for metric, values in run.items():
            differences = [a - b for a, b in zip(values, first[metric], strict=True)]
            half = T95 * stdev(differences) / len(differences) ** 0.5
            text = f"{mean(differences):+.2f} ± {half:.2f}"
            cells.append(f"**{text}**" if abs(mean(differences)) > half else text)
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@cache
def digits(*, held_out):
    """Scikit-learn's 1797 handwritten digits, 64 pixels in [0, 1] each, and their classes; every fifth is held out."""
    data = load_digits()
    images, classes = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    mine = (torch.arange(len(images)) % 5 == 0) == held_out
    return images[mine], classes[mine]
