"""A GPT that reads a page of text and answers from its last position.

The blocks are nanoGPT's: pre-LayerNorm, causal self-attention, GELU MLP. Four things differ:

- Only the last position is read.
- Instead of a head for the next token there are heads for the policy, the value and a prediction.
- A position's embedding is the sum of a row's and a column's, so what is learned about a column holds in every row.
- The initial weights are large enough for attention to find one character among 1944.

Left out: dropout, biases inside the blocks, weight tying, generation of text. This is the whole model, and it is slow,
because every token goes through every block. fast/ computes the same up to rounding, one layer thousands of times
faster, six layers about twice as fast.

A page is rows * columns ASCII codes from a known set of characters. The shapes in comments are those of Breakout's,
which has 24 rows of 81 characters, 1944 in all, from a set of 7.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

UNKNOWN = 255  # in place of the index of a character


@dataclass
class GPTConfig:
    """What a GPT reads, what it chooses from, and its sizes. Raises ValueError if they do not fit together.

    rows, columns: of a page; with the newline that ends each line.
    characters: of which pages consist, different ASCII characters.
    """

    rows: int
    columns: int
    characters: str
    n_action: int
    n_layer: int = 1
    n_head: int = 16
    n_embd: int = 64
    mlp_expansion: int = 4

    def __post_init__(self):
        sizes = {name: value for name, value in vars(self).items() if name != "characters"}
        if any(type(size) is not int or size < 1 for size in sizes.values()):
            raise ValueError(f"the sizes of a GPT must be integers and at least 1: {sizes}")
        characters = self.characters
        if type(characters) is not str or not 0 < len(set(characters)) == len(characters) or not characters.isascii():
            raise ValueError(f"the characters of pages must be different ASCII characters, not {characters!r}")
        # Rows and columns have half of the dimensions each, and sinusoids() splits a half into sines and cosines.
        if self.n_embd % self.n_head or self.n_embd % 4:
            unit = math.lcm(self.n_head, 4)
            below = self.n_embd // unit * unit
            fitting = f"{below} and {below + unit}" if below else unit
            sizes = f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head} and of 4"
            raise ValueError(f"{sizes}; the nearest that fit: {fitting}")

    @property
    def tokens(self):
        """The length of a page."""
        return self.rows * self.columns

    @property
    def num_parameters(self):
        """The number of parameters of a GPT of these sizes, without building it."""
        C = self.n_embd
        outputs = self.n_action + 1 + self.rows + self.columns
        block = 2 * C + 4 * C * C + 2 * self.mlp_expansion * C * C  # LayerNorms, attention, MLP
        return (len(self.characters) + self.rows + self.columns) * C + self.n_layer * block + C + (C + 1) * outputs


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_expansion * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_expansion * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Reads pages of text and returns action logits and values: `logits, values = gpt(tokens)`."""

    group_size = 1  # how many pages that begin alike should stay together in a minibatch

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(len(config.characters), C)
        self.wre = nn.Embedding(config.rows, C)
        self.wce = nn.Embedding(config.columns, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=False)
        self.policy_head = nn.Linear(C, config.n_action)
        self.value_head = nn.Linear(C, 1)
        self.change_head = nn.Linear(C, config.rows + config.columns)  # which rows and columns of the next page differ
        self.register_buffer("character_of", character_indices(config.characters), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialise the weights. With nanoGPT's std of 0.02 attention would be uniform: 1/1944 for the ball."""
        C = self.config.n_embd
        nn.init.normal_(self.wte.weight)
        self.wre.weight.copy_(sinusoids(self.config.rows, C))
        # Columns use the other half of the dimensions.
        self.wce.weight.copy_(sinusoids(self.config.columns, C).roll(C // 2, dims=1))
        for block in self.blocks:
            query_key, value = block.attn.c_attn.weight.split([2 * C, C])
            nn.init.normal_(query_key, std=3 / math.sqrt(C))  # attention scores then differ by about ten
            for weight in (value, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight):
                nn.init.normal_(weight, std=1 / math.sqrt(weight.size(1)))  # which keeps the variance
        for head, gain in ((self.policy_head, 0.01), (self.value_head, 1.0), (self.change_head, 0.1)):
            nn.init.normal_(head.weight, std=gain / math.sqrt(C))
            nn.init.zeros_(head.bias)

    def forward(self, tokens):
        """Return action logits (B, A) and values (B,), float32, for tokens (B, 1944), which `encode` checks."""
        return self.heads(self.features(self.encode(tokens)))

    def encode(self, tokens):
        """Turn tokens, which are ASCII codes, into indices of the config's characters, (B, 1944) uint8.

        tokens: (B, 1944) uint8, a tensor or an array. Raises ValueError for others, and for an unknown character.
        """
        check_pages(tokens, self.config)
        tokens = torch.as_tensor(tokens, device=self.device)
        characters = self.character_of[tokens.int()]
        unknown = characters == UNKNOWN
        if unknown.any():
            page, position = unknown.nonzero()[0].tolist()
            where = f" of page {page}, position {position},"
            raise ValueError(unknown_character(int(tokens[page, position]), self.config, where))
        return characters

    def features(self, characters):
        """Return the last position after the final LayerNorm, (B, C), for characters (B, 1944)."""
        return self.ln_f(self.hidden(characters)[:, -1])

    def hidden(self, characters):
        """Return every position after the last block, (B, T, C), for characters (B, 1944)."""
        x = self.embed(characters)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, characters):
        """Return every position before the first block, (B, T, C), for characters (B, 1944)."""
        position = torch.arange(self.config.tokens, device=self.device)
        columns = self.config.columns
        return self.wte(characters.int()) + self.wre(position // columns) + self.wce(position % columns)

    def heads(self, features):
        """Return action logits (B, A) and values (B,) for features (B, C)."""
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def prepare_minibatches(self, characters):
        """Prepare the characters (K, B, 1944) of K minibatches for `features`. Here nothing need be done."""
        return characters

    def inference_function(self):
        """Return a function that computes logits and values of encoded pages, without gradients.

        It is valid until the weights change.
        """

        @torch.no_grad()
        def act(characters):
            return self.heads(self.features(characters))

        return act

    def changes(self, tokens, next_tokens):
        """Return what change_head predicts: which rows and columns differ in the next pages, (B, 24 + 81) bool."""
        changed = (tokens != next_tokens).unflatten(1, (self.config.rows, self.config.columns))
        return torch.cat([changed.any(2), changed.any(1)], dim=1)

    @property
    def device(self):
        return self.wte.weight.device


def character_indices(characters):
    """Return a table (256,) uint8 from an ASCII code to its index in a string of characters, or to UNKNOWN."""
    table = torch.full((256,), UNKNOWN, dtype=torch.uint8)
    table[list(characters.encode())] = torch.arange(len(characters), dtype=torch.uint8)
    return table


def check_pages(tokens, config):
    """Raise ValueError unless tokens, a tensor or an array, are (B, rows * columns) uint8 with B at least 1."""
    right_shape = tokens.ndim == 2 and tokens.shape[1] == config.tokens and len(tokens) > 0
    if not right_shape or str(tokens.dtype).removeprefix("torch.") != "uint8":
        got = f"{tuple(tokens.shape)} {tokens.dtype}"
        raise ValueError(f"pages must be (B, {config.tokens}) uint8 tokens, B at least 1, not {got}")


def unknown_character(code, config, where=""):
    """Return the message of an error about a token that is no character of a page."""
    return f"token {code} ({chr(code)!r}){where} is not in the character set {config.characters!r}"


def sinusoids(n, C):
    """Return sines and cosines for n positions in the first half of C dimensions, (n, C).

    Their wavelengths go from 2 pi to 4 n in geometric steps.
    """
    rates = torch.logspace(0, math.log10(2 * math.pi / (4 * n)), C // 4)
    angles = torch.arange(n).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(n, C // 2)], dim=1)
