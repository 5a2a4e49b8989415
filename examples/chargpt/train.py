"""A small character-level GPT, trained on the Python standard library's own source.

    dtrain run examples/chargpt/job.yaml
    python examples/chargpt/train.py --steps 50     # one process, no dtrain needed

The text is the source of the modules that came with this Python, so nothing is
downloaded. Batches are a function of (step, rank): there is no data position to
save, and any number of ranks can resume.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dtrain import trainer


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class CharGPT(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, width: int = 64, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def read_corpus(characters_max: int = 2_000_000) -> str:
    """Concatenate the standard library's modules, in name order."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py")))
    return "".join(c for c in text[:characters_max] if c.isascii())


def sample(model: CharGPT, alphabet: str, context: int, length: int = 120) -> str:
    """Continue from a newline, greedily choosing among likely characters."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[alphabet.index("\n")]])
    for _ in range(length):
        odds = F.softmax(model(tokens[:, -context:])[0, -1] / 0.8, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=generator)[None]], dim=1)
    return "".join(alphabet[i] for i in tokens[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--context", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    run = trainer.join()
    text = read_corpus()
    alphabet = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(alphabet)}
    data = torch.tensor([index[c] for c in text], dtype=torch.uint8)

    model = CharGPT(len(alphabet), args.context).to(run.device)
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if run.world_size > 1 else model
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    run.track(model=ddp, optimizer=optimizer, schedule=schedule)
    for step in run.steps(args.steps):
        draw = torch.Generator().manual_seed(step * 4096 + run.rank)
        starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=draw)
        window = torch.stack([data[s : s + args.context + 1] for s in starts.tolist()]).long().to(run.device)
        logits = ddp(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.report(loss=loss.item())
        if run.rank == 0 and step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f}", flush=True)

    if run.rank == 0:
        with torch.no_grad():
            print(sample(model.cpu(), alphabet, args.context), flush=True)


if __name__ == "__main__":
    main()
