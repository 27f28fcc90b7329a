"""The task `text`: a small GPT predicts the next character of the Python language reference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from steprule.lab.tasks import Task, accuracy

__all__ = ["CONTEXT", "CharacterGPT", "character_task", "task"]

CONTEXT = 64
WIDTH, HEADS, LAYERS = 96, 4, 2
SAMPLE_LENGTH, SAMPLE_SEED, TEMPERATURE = 1000, 0, 0.7


def task() -> Task:
    """64 characters to the 64 that follow, from the help texts that come with Python."""
    # Topics quote each other. A paragraph must not be both trained on and tested on, so each is used once.
    paragraphs = dict.fromkeys(p.strip("\n") for t in topics.values() for p in t.split("\n\n"))
    text = "\n\n".join(paragraphs)
    return character_task(text, name="pydoc_data.topics", beginning="The ", epochs=4)


def character_task(
    text: str, *, name: str, beginning: str, epochs: int, held_out: int = 5, validation: str | None = None
) -> Task:
    """64 characters of a text to the 64 that follow.

    name: of the text, for the facts. beginning: what the sample at the end of a run continues. held_out: the
    share of validation and of test in percent, which are the end of the text. validation: another text for it;
    then there is no test.
    """
    characters = sorted({*text, *(validation or "")})
    inputs, targets = _windows(text, characters)
    if validation is None:
        held = len(inputs) * held_out // 100
        sizes = [len(inputs) - 2 * held, held, held]
        train, evaluated, test = zip(torch.split(inputs, sizes), torch.split(targets, sizes), strict=True)
    else:
        train, evaluated, test = (inputs, targets), _windows(validation, characters), None

    def finish(model: nn.Module, folder: Path) -> None:
        (folder / "sample.txt").write_text(_write(model, characters, beginning), encoding="utf-8")

    return Task(
        model=CharacterGPT(len(characters)),
        train=train,
        validation=evaluated,
        test=test,
        loss=_next_character_loss,
        score=accuracy,
        epochs=epochs,
        batch_size=16,
        threads=1,
        loss_label="cross-entropy (nats per character)",
        finish=finish,
        facts={
            "data": f"{name}, {len(text):,} characters, {len(characters)} different",
            "text sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
    )


def _windows(text: str, characters: list[str]) -> tuple[Tensor, Tensor]:
    """Every 64 characters, as their places in the list, and the 64 that are one further."""
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    count = (len(tokens) - 1) // CONTEXT
    return tokens[: count * CONTEXT].view(count, CONTEXT), tokens[1 : count * CONTEXT + 1].view(count, CONTEXT)


def _next_character_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


class CharacterGPT(nn.Module):
    """A decoder-only transformer: (batch, time) character numbers to (batch, time, character) logits."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the next character at every position."""
        hidden = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


class Block(nn.Module):
    """Causal self-attention, then a two-layer network, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm_network = nn.LayerNorm(WIDTH)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape out as in: (batch, time, width)."""
        batch, time, width = hidden.shape
        heads = self.query_key_value(self.norm_attention(hidden))
        query, key, value = heads.view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mix(attended.transpose(1, 2).reshape(batch, time, width))
        return hidden + self.network(self.norm_network(hidden))


def _write(model: nn.Module, characters: list[str], beginning: str) -> str:
    """Continue a beginning with sampled characters."""
    draw = torch.Generator().manual_seed(SAMPLE_SEED)
    tokens = torch.tensor([[characters.index(character) for character in beginning]])
    with torch.no_grad():
        for _ in range(SAMPLE_LENGTH):
            logits = model(tokens[:, -CONTEXT:])[:, -1] / TEMPERATURE
            following = torch.multinomial(logits.softmax(-1), 1, generator=draw)
            tokens = torch.cat([tokens, following], dim=1)
    return "".join(characters[i] for i in map(int, tokens[0])) + "\n"
