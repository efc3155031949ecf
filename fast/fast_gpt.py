"""The GPT of model.py, with everything that the pages of a batch have in common computed once."""

import numpy as np
import torch

from breakout_ascii import COLUMNS, ROWS, TOKENS
from fast.attention_tables import after_attention, pair_table
from fast.line_index import LineIndex
from fast.shared_attention import LineCache, shared_attention, tree_of
from fast.shared_prefixes import prefix_features, prefix_tree
from model import GPT


class FastGPT(GPT):
    """A `GPT`: the same parameters, the same state_dict, and but for rounding the same numbers. Its encoded pages are 24 line ids.

    One layer shares lines and their pieces (shared_attention.py, on the CPU), deeper models their prefixes (shared_prefixes.py). Line ids hold until
    the next `inference_cache()`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.index = LineIndex()
        self.bf16 = self.compile_blocks = False
        # Minibatches of deeper models keep 8 pages that begin alike together: 16 leave 6 % fewer tokens, 4 leave 10 % more.
        self.group_size = 1 if config.n_layer == 1 else 8

    def forward(self, tokens):
        kept, self.index = self.index, LineIndex()  # the line ids of a rollout stay as they are
        try:
            return super().forward(tokens)
        finally:
            self.index = kept

    def encode(self, tokens):
        """(B, 1944) uint8 ASCII codes, a tensor or an array -> (B, 24) int64 ids of their lines. Raises ValueError."""
        return torch.from_numpy(self.index.encode(tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens)).to(
            self.device
        )

    def features(self, lines):
        """(B, 24) line ids -> (B, C)."""
        if self.config.n_layer == 1 and self.index.pages_end_alike:
            return after_attention(self, shared_attention(*pair_table(self), tree_of(self.index, lines.numpy())))
        return prefix_features(
            self, prefix_tree(self.index, lines.cpu().numpy(), self.device), self.bf16, self.compile_blocks
        )

    def inference_cache(self):
        """As in `GPT`, with every distinct line summed once. Forgets all line ids, so an older cache is of no use any more."""
        self.index = index = LineIndex()
        cache, plain = LineCache(self, index) if self.config.n_layer == 1 else None, super().inference_cache()

        def act(lines):
            if self.index is not index:
                raise RuntimeError("this inference cache is out of date: the policy has made a newer one")
            return cache(lines) if cache and index.pages_end_alike else plain(lines)

        return act

    def changes(self, tokens, next_tokens):
        """As in `GPT`, ten times as fast on a CPU: few characters change."""
        if self.device.type != "cpu":
            return super().changes(tokens, next_tokens)
        page, position = np.divmod(np.flatnonzero(np.asarray(tokens) != np.asarray(next_tokens)), TOKENS)
        changes = np.zeros((len(tokens), ROWS + COLUMNS), bool)
        changes[page, position // COLUMNS] = changes[page, ROWS + position % COLUMNS] = True
        return torch.from_numpy(changes)
