"""What becomes of a trained network under each scheme: as converted, recalibrated, and fine-tuned; or from scratch.

    python examples/pretrained.py gpt --data text.txt
    python examples/pretrained.py gpt --data text.txt --from-scratch --picture curves.png
    python examples/pretrained.py vit --data images/
    python examples/pretrained.py resnet20 --data images/

``images/`` holds ``train/CLASS/*`` and ``test/CLASS/*``; the text is cut into characters. A plain network is trained
for ``--steps`` steps and converted by each scheme. Told are its figure of merit (accuracy, or loss in nats) before any
training, after the batch norms' statistics were taken again, and after a tenth and a third of the steps of fine-tuning
at a tenth of the learning rate, beside the plain network fine-tuned alike. After fine-tuning all take the batch norms'
statistics again, plain ones too. Dr2 is led from a = 1/4 to a = 1/2 in the course of the fine-tuning.

With ``--from-scratch`` networks with the same initial weights are converted and trained for all the steps, and tested
on the way. Every run sees the same batches.

``--seeds`` repeats all of it, ``--schemes`` names those to try. Results are printed, and written as JSON to
``--output``. Needs ``pip install "revify[vision,demo]"``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from revify.demo.data import augment, image_folder, normalize

SCHEMES: dict[str, revify.Scheme | None] = {
    "plain": None,
    "RevNet": revify.RevNet(),
    "Midpoint": revify.Midpoint(),
    "Momentum": revify.Momentum(),
    "Dr2": revify.Dr2(),
    "BDIA": revify.BDIA(),
}


class Task:
    """A network to train, batches, and a figure of merit on test data."""

    metric: str
    batch: int
    rate: float

    def make(self) -> nn.Module:
        raise NotImplementedError

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def test(self, model: nn.Module) -> float:
        raise NotImplementedError


class Pictures(Task):
    metric, batch = "accuracy, %", 100

    def __init__(self, path: str) -> None:
        self.data = image_folder(path)
        self.mean = self.data.train_images.float().mean(0)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.data.train_labels), (self.batch,), generator=generator)
        x = normalize(self.data.train_images[chosen], self.mean)
        return augment(x, 4, self.data.flip, generator), self.data.train_labels[chosen]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        model.eval()
        images, labels = self.data.test_images[:2000], self.data.test_labels[:2000]
        hits = [
            (model(normalize(x, self.mean)).argmax(1) == y).sum()
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        ]
        return 100 * float(sum(hits)) / len(labels)


class ResNet20(Pictures):
    rate = 1e-2

    def make(self) -> nn.Module:
        return revify.models.cifar_resnet(20, num_classes=len(self.data.classes))


class ViT(Pictures):
    rate = 1e-3

    def make(self) -> nn.Module:
        from torchvision.models import VisionTransformer

        model = VisionTransformer(32, 8, 6, 3, 96, 192, num_classes=len(self.data.classes))
        nn.init.normal_(model.heads.head.weight, std=0.02)
        return model


class GPT(Task):
    metric, batch, rate, context = "loss, nats", 32, 1e-3, 64

    def __init__(self, path: str) -> None:
        text = Path(path).read_text()
        self.letters = sorted(set(text))
        codes = {letter: i for i, letter in enumerate(self.letters)}
        tokens = torch.tensor([codes[letter] for letter in text])
        cut = len(tokens) * 9 // 10
        self.train, self.held = tokens[:cut], tokens[cut:]

    def make(self) -> nn.Module:
        return Language(len(self.letters), self.context)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=generator)
        rows = self.train[starts[:, None] + torch.arange(self.context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        model.eval()
        count = min(256, len(self.held) // (self.context + 1))
        rows = self.held[: count * (self.context + 1)].view(count, -1)
        return float(self.loss(model, rows[:, :-1], rows[:, 1:]))


class Language(nn.Module):
    """A small GPT."""

    def __init__(self, letters: int, context: int, width: int = 96, layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


TASKS: dict[str, Callable[[str], Task]] = {"gpt": GPT, "vit": ViT, "resnet20": ResNet20}


def train(task: Task, model: nn.Module, steps: int, rate: float, seed: int) -> Iterator[int]:
    """AdamW with a linear warm-up of a twentieth and a cosine; gives the number of steps after each."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
        ],
        [warm],
    )
    for step in range(steps):
        model.train()
        x, y = task.sample(generator)
        task.loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step + 1


def converted(model: nn.Module, scheme: revify.Scheme | None) -> nn.Module:
    return model if scheme is None else revify.convert(model, coupling=scheme)


def fine_tuned(task: Task, trained: nn.Module, scheme: revify.Scheme | None, steps: int, seed: int) -> float:
    model = converted(trained, scheme)
    if scheme is None:
        model = task.make()
        model.load_state_dict(trained.state_dict())
    numbers = revify.Dr2Schedule(model, max(1, steps // 2), start=0.25) if isinstance(scheme, revify.Dr2) else None
    for _ in train(task, model, steps, task.rate / 10, seed + 1):
        if numbers is not None:
            numbers.step()
    recalibrate(task, model, seed)
    return task.test(model)


def recalibrate(task: Task, model: nn.Module, seed: int) -> bool:
    """Whether there are batch norms."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return False
    generator = torch.Generator().manual_seed(seed)
    revify.recalibrate(model, [task.sample(generator)[0] for _ in range(20)])
    return True


def kept(task: Task, model: nn.Module) -> int:
    x, y = task.sample(torch.Generator().manual_seed(0))
    return revify.kept_bytes(lambda: task.loss(model, x, y), exclude=list(model.parameters()))


Rows = dict[str, dict[str, float]]  # by scheme, then by column


def study(task: Task, schemes: Sequence[str], steps: int, seed: int) -> Rows:
    torch.manual_seed(seed)
    trained = task.make()
    for _ in train(task, trained, steps, task.rate, seed):
        pass
    found: Rows = {}
    for name in schemes:
        scheme = SCHEMES[name]
        row = found[name] = {"converted": task.test(converted(trained, scheme))}
        model = converted(trained, scheme)
        if scheme is not None and recalibrate(task, model, seed):
            row["recalibrated"] = task.test(model)
        for share in (10, 3):
            began = time.perf_counter()
            row[f"1/{share}"] = fine_tuned(task, trained, scheme, steps // share, seed)
            row["seconds a step"] = (time.perf_counter() - began) / (steps // share)
        model = converted(trained, scheme).train()
        row["kept, MB"] = kept(task, model) / 1e6
        say(seed, name, row)
    return found


def from_scratch(task: Task, schemes: Sequence[str], steps: int, seed: int) -> Rows:
    """The figure of merit after each sixth of the steps."""
    found: Rows = {}
    for name in schemes:
        torch.manual_seed(seed)
        model = converted(task.make(), SCHEMES[name])
        row = found[name] = {}
        for step in train(task, model, steps, task.rate, seed):
            if step % max(1, steps // 6) == 0 or step == steps:
                recalibrate(task, model, seed)
                row[str(step)] = task.test(model)
        say(seed, name, row)
    return found


def say(seed: int, name: str, row: dict[str, float]) -> None:
    print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def draw(results: list[Rows], metric: str, path: Path) -> None:
    """The mean over the seeds against the steps, a line a scheme, and between which values it lies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(results[0]):
        columns = list(zip(*(rows[name].values() for rows in results), strict=True))
        steps = [int(step) for step in results[0][name]]
        style = {"color": f"C{number}"} if name != "plain" else {"color": "black", "linestyle": "--", "zorder": 3}
        axes.plot(steps, list(map(statistics.mean, columns)), marker=".", label=name, **style)
        axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.1, **style)
    axes.set(xlabel="steps", ylabel=metric)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def table(results: list[Rows]) -> str:
    """Means over the seeds, and the standard deviations where there are several."""
    columns = list(dict.fromkeys(column for rows in results for row in rows.values() for column in row))
    lines = ["| scheme | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in results[0]:
        cells = []
        for column in columns:
            values = [rows[name][column] for rows in results if column in rows[name]]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data", required=True, help="a text, or a folder of images")
    parser.add_argument("--steps", type=int, default=1000, help="of the plain network (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help="(all)")
    parser.add_argument("--from-scratch", action="store_true", help="train converted networks from scratch instead")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--picture", type=Path, help="a PNG file of training from scratch")
    parser.add_argument("--threads", type=int, help="of a CPU")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    task = TASKS[options.task](options.data)
    run = from_scratch if options.from_scratch else study
    results = [run(task, options.schemes, options.steps, seed) for seed in range(options.seeds)]
    print(f"\n{options.task}, {options.steps} steps, {options.seeds} seeds; {task.metric}\n\n{table(results)}")
    if options.picture and options.from_scratch:
        draw(results, task.metric, options.picture)
    if options.output:
        options.output.write_text(
            json.dumps({"task": options.task, "steps": options.steps, "seeds": results}, indent=1)
        )


if __name__ == "__main__":
    main()
