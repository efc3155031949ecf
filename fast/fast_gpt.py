"""A GPT like that in model.py which computes only once what the pages of a batch have in common."""

import numpy as np
import torch

from fast.attention_tables import features_from_attention, pair_table
from fast.line_index import LineIndex
from fast.shared_attention import LineCache, share_pages, shared_attention
from fast.shared_prefixes import prefix_features, prefix_tree
from model import GPT


class FastGPT(GPT):
    """A `GPT` with the same parameters, the same state_dict and, except for rounding, the same outputs.

    `encode` replaces a page by the ids of its 24 lines. They are valid until the next `inference_function()`. With one
    layer, pages share lines and pieces of lines (shared_attention.py, on the CPU only). With more layers, they share
    prefixes (shared_prefixes.py).
    """

    def __init__(self, config):
        super().__init__(config)
        self.index = LineIndex(config)
        # `GPURunner` sets these two on a GPU, where more layers than one profit from them.
        self.bf16 = False
        self.compile_blocks = False
        # With more layers minibatches keep pages that begin alike together, in groups of 8. With groups of 16 there
        # would be 6 % fewer tokens to compute, with groups of 4 there would be 10 % more.
        self.group_size = 1 if config.n_layer == 1 else 8

    def forward(self, tokens):
        index = self.index
        self.index = LineIndex(self.config)  # only for this call, so that the present one does not grow by its lines
        try:
            return super().forward(tokens)
        finally:
            self.index = index

    def encode(self, tokens):
        """Replace the lines of pages by their ids.

        Args: tokens (B, 1944) uint8, a tensor or an array.
        Returns: (B, 24) int64.
        Raises: ValueError for anything but pages.
        """
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.cpu()
        return torch.from_numpy(self.index.encode(tokens)).to(self.device)

    def features(self, lines):
        """Do the work of `GPT.features` on line ids (B, 24), and return (B, C)."""
        if self.config.n_layer == 1 and self.index.pages_end_alike:
            last_character = self.index.last_character
            table, rstd = pair_table(self, last_character)
            y = shared_attention(table, rstd, share_pages(self.index, lines.numpy()))
            return features_from_attention(self, y, last_character)
        tree = prefix_tree(self.index, lines.cpu().numpy(), self.device)
        return prefix_features(self, tree, self.bf16, self.compile_blocks)

    def inference_function(self):
        """Do the work of `GPT.inference_function`, faster with one layer.

        All line ids and inference functions from before become invalid.
        """
        index = LineIndex(self.config)
        self.index = index
        from_features = super().inference_function()
        from_lines = None

        def act(lines):
            nonlocal from_lines
            if self.index is not index:
                raise RuntimeError("this inference function is out of date: the policy has made a newer one")
            if self.config.n_layer > 1 or not index.pages_end_alike:
                return from_features(lines)
            if from_lines is None:  # only now is it known how pages end
                from_lines = LineCache(self, index)
            return from_lines(lines)

        return act

    def changes(self, tokens, next_tokens):
        """Do the work of `GPT.changes`, ten times as fast on a CPU, because few characters change."""
        if self.device.type != "cpu":
            return super().changes(tokens, next_tokens)
        rows, columns = self.config.rows, self.config.columns
        page, position = np.divmod(np.flatnonzero(np.asarray(tokens) != np.asarray(next_tokens)), rows * columns)
        changes = np.zeros((len(tokens), rows + columns), bool)
        changes[page, position // columns] = True
        changes[page, rows + position % columns] = True
        return torch.from_numpy(changes)
