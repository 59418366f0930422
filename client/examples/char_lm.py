"""Train a small byte-level transformer language model on the source text of the installed Python standard library.

    python char_lm.py                                     (farstep's private embedded server)
    FARSTEP_REMOTE=gpu-box:50051 python char_lm.py        (a server of your own)
    torchrun --nproc-per-node 2 char_lm.py                (two workers, each with half of every global batch)

It shows what a usual training script has: param groups (weight decay on matrices only), warm-up and cosine schedule,
gradient clipping, and optionally bfloat16 autocast (--bf16). It ends with the bits per byte on modules that were held
out, and a short sample of what the model writes. `--steps` sets the length of the run and of the schedule; `--seconds`
ends a one-process run earlier.

Expect about 2.5 bits per byte after the default 800 steps: 2.51 in one process (39 s on two cores with torch 2.13's own
AdamW) and 2.50 with two workers, on the modules of Python 3.11. The text, and so the figure, differs between versions
of Python.

Under torchrun every rank clips the gradient of its own slice before the server takes the mean, which is close to, but
not the same as, clipping the gradient of the global batch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from farstep import optim

VOCABULARY = 256
CONTEXT = 128
WIDTH = 128
LAYERS = 2
HEADS = 4
TRAINING_BYTES = 800_000
HELD_OUT_BYTES = 64_000
HELD_OUT_EVERY = 10
WARMUP_STEPS = 20
MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.1
SAMPLE_BYTES = 240
REPORT_EVERY_STEPS = 50


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    steps: int
    seconds: float
    batch_size: int
    lr: float
    seed: int
    bf16: bool
    device: str


@dataclass(frozen=True)
class Text:
    """The bytes of the training files and of the held-out files, each as one uint8 tensor of shape (N,)."""

    train: Tensor
    held_out: Tensor


class CharModel(nn.Module):
    """A pre-norm transformer decoder: bytes int64 (B, T) with T <= CONTEXT to logits (B, T, VOCABULARY)."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        nn.init.normal_(self.bytes.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits for the byte that follows each byte of text."""
        length = text.shape[1]
        hidden = self.bytes(text) + self.positions.weight[:length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask[:length, :length], is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description="Train a small transformer on Python's standard library.")
    parser.add_argument("--steps", type=int, default=800, help="length of the run (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop training after this long (default: never)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="global batch, over all ranks (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 autocast; parameters stay float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    return Options(**vars(parser.parse_args()))


def load_text() -> Text:
    """Read the top-level modules in the order of their names; every tenth is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    train, held_out = bytearray(), bytearray()
    for index, file in enumerate(files):
        (held_out if index % HELD_OUT_EVERY == 0 else train).extend(file.read_bytes())
    return Text(
        torch.frombuffer(train[:TRAINING_BYTES], dtype=torch.uint8),
        torch.frombuffer(held_out[:HELD_OUT_BYTES], dtype=torch.uint8),
    )


def build_optimizer(model: CharModel, lr: float) -> torch.optim.Optimizer:
    """Decay the matrices of the layers only: not biases, norms or embeddings."""
    decayed = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim >= 2]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear up over WARMUP_STEPS, then along a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, CONTEXT) each, of the windows of text that begin at starts, shape (B,)."""
    spans = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)].long()
    return spans[:, :-1], spans[:, 1:]


def loss_on(model: CharModel, text: Tensor, starts: Tensor, options: Options) -> Tensor:
    """Mean cross-entropy, in nats per byte, over the windows that begin at starts."""
    inputs, targets = (part.to(options.device) for part in windows(text, starts))
    with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16, enabled=options.bf16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_byte(model: CharModel, text: Tensor, options: Options) -> float:
    """Mean code length of the text in bits per byte, over windows that do not overlap."""
    starts = torch.arange(0, len(text) - CONTEXT, CONTEXT)
    losses = [loss_on(model, text, part, options).item() * len(part) for part in starts.split(64)]
    return sum(losses) / len(starts) / math.log(2)


@torch.no_grad()
def sample(model: CharModel, prompt: str, options: Options) -> str:
    """Continue the prompt by SAMPLE_BYTES bytes, drawn at temperature 0.7."""
    generator = torch.Generator().manual_seed(options.seed)
    text = list(prompt.encode())
    for _ in range(SAMPLE_BYTES):
        logits = model(torch.tensor([text[-CONTEXT:]], device=options.device))[0, -1]
        probabilities = (logits.float().cpu() / 0.7).softmax(dim=0)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text).decode(errors="replace")


def train(model: CharModel, text: Text, options: Options, rank: int, world: int) -> int:
    """Train in place, report on rank 0, and return the number of steps taken."""
    optimizer = build_optimizer(model, options.lr)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, options.steps))
    # Every rank draws the same numbers from it, so that all see the same global batches.
    generator = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text.train) - CONTEXT, (options.batch_size,), generator=generator)
        optimizer.zero_grad()
        loss = loss_on(model, text.train, starts[rank::world], options)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        seconds = time.perf_counter() - start
        stop = seconds >= options.seconds or step == options.steps
        if rank == 0 and (stop or step % REPORT_EVERY_STEPS == 0):
            print(
                f"step {step:4d}/{options.steps}  loss {loss.item():.4f}  lr {scheduler.get_last_lr()[0]:.2e}  "
                f"{1000 * seconds / step:.0f} ms per step",
                flush=True,
            )
        if stop:
            break
    return step


def main() -> None:
    options = parse_options()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % world:
        sys.exit(f"--batch-size {options.batch_size} is not a multiple of the number of workers, {world}")
    if world > 1 and options.seconds != math.inf:
        sys.exit("--seconds is for one process: the clocks of several would not agree on the last step; use --steps")
    torch.manual_seed(options.seed)
    text = load_text()
    model = CharModel().to(options.device)
    if rank == 0:
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out, {size:,} parameters", flush=True
        )
    start = time.perf_counter()
    steps = train(model, text, options, rank, world)
    if rank == 0:
        seconds = time.perf_counter() - start
        model.eval()
        print(f"\n{sample(model, 'def ', options)}\n")
        bits = bits_per_byte(model, text.held_out, options)
        print(f"final held-out {bits:.6f} bits per byte  ({steps} steps, {world} worker(s), {seconds:.1f} s)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)
