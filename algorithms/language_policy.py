"""A causal language model as a policy: it reads a text and says how probable each of some answers is behind it."""

import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.common import need
from algorithms.language_model import TrainedOnly, check_scores, transformer
from command_line import CommandLineError
from ppo import Policy


class LanguagePolicy(TrainedOnly, Policy):
    """Texts behind a prefix that never changes -> logits (N, A), the log-probability of each answer up to a constant; values (N,).

    A subclass defines `encode(obs)` by `encode_texts`. Encoded texts are (N, L + A) float32: token numbers, -1 behind a shorter text, and
    the log-probability that the reference gives each answer, 0 without a reference. Dropout is never on: what acts is what learns.
    """

    def __init__(self, model, tokenizer, prefix, answers, reference=None):
        """model: peft's or transformers', in eval mode. reference(): a context that gives the model to compare with; None: none.

        Raises CommandLineError if the tokenizer cannot tell the answers apart.
        """
        super().__init__()
        self.model, self.tokenizer, self.reference, self.reference_cache = model, tokenizer, reference, None
        self.value_head = nn.Linear(transformer(model).config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.answers = answers = [self.tokens_of(answer) for answer in answers]
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise CommandLineError("the model's tokenizer cannot tell the answers apart; take another model")
        # The rest of the answers, one behind the other. A token that is read scores the one that follows, so the last of each is not read.
        rest = [(i, j, answer[j], answer[j + 1]) for i, answer in enumerate(answers) for j in range(len(answer) - 1)]
        for name, numbers in (
            ("prefix", [start + self.tokens_of(prefix)]), ("first_tokens", [answer[0] for answer in answers]),
            ("later_tokens", [*zip(*rest)] if rest else [[]] * 4),  # of each: its answer, its place there, its number, the number that follows
        ):  # fmt: skip
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def check(self, text):
        """Raises CommandLineError for a model whose own forward pass scores the answers behind a text differently from `read` and `score`: one
        without a causal mask, for example, or one that scales its logits. And for a text that is too long for it."""
        tokens = self.tokens_of(text)
        before = self.prefix[0].tolist() + tokens
        longest = getattr(transformer(self.model).config.get_text_config(), "max_position_embeddings", None) or math.inf
        if len(before) + max(map(len, self.answers)) > longest:
            raise CommandLineError(f"the model reads {longest} tokens at most, and the game's texts have more; take another model")
        tokens = torch.tensor([tokens], device=self.prefix.device)
        check_scores(
            self.model, lambda: self.score(self.model, self.read(self.model, tokens, self.read_prefix(self.model)))[0],
            lambda: torch.stack([self.logprob(before, answer) for answer in self.answers]),
        )  # fmt: skip

    def logprob(self, before, answer):
        """Token numbers -> how probable the model's own forward pass says that the answer is behind them."""
        logits = self.model(input_ids=torch.tensor([before + answer], device=self.prefix.device)).logits[0, len(before) - 1 : -1]
        return F.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(answer, device=logits.device)[:, None]).sum()

    def tokens_of(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_texts(self, texts, longest):
        """longest: the most tokens that a text may have."""
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([row + [-1] * (longest - len(row)) for row in tokens], device=self.prefix.device)
        return torch.cat([tokens.float(), self.reference_logprobs(tokens)], 1)

    def split(self, encoded):
        """-> token numbers (N, L), the reference's log-probabilities (N, A)."""
        return encoded[:, : -len(self.first_tokens)].long(), encoded[:, -len(self.first_tokens) :]

    @torch.no_grad()
    def reference_logprobs(self, tokens):
        if self.reference is None:
            return torch.zeros(len(tokens), len(self.first_tokens), device=tokens.device)
        with self.reference() as model:
            self.reference_cache = self.reference_cache or self.read_prefix(model)
            return F.log_softmax(self.score(model, self.read(model, tokens, self.reference_cache)), dim=-1)

    def features(self, encoded):
        return self.read(self.model, self.split(encoded)[0], self.read_prefix(self.model))

    def heads(self, hidden):
        return self.score(self.model, hidden), self.value_head(hidden[:, 0].float()).squeeze(-1)

    def inference_cache(self):
        with torch.no_grad():
            prefix = self.read_prefix(self.model)
        return torch.no_grad()(lambda encoded: self.heads(self.read(self.model, self.split(encoded)[0], prefix)))

    def read_prefix(self, model):
        """-> keys and values of the prefix, (1, heads, P, D) each, a pair for every layer: what all texts begin with is read once."""
        cache = need("transformers").DynamicCache()
        run(model, cache, input_ids=self.prefix)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def read(self, model, tokens, prefix):
        """Token numbers (B, L), -1 behind a shorter text -> hidden states (B, 1 + E, C): of the last token of each text, and of the E
        tokens of `later_tokens`, each of which sees the text and what stands before it in its own answer."""
        lengths, (answer, place, number, _) = (tokens >= 0).sum(1), self.later_tokens
        B, L, E, P = len(tokens), int(lengths.max()), len(answer), prefix[0][0].shape[2]
        at = torch.arange(L + E, device=tokens.device)
        sees = torch.zeros(B, L + E, P + L + E, dtype=torch.bool, device=tokens.device)  # may this token see that one?
        sees[:, :, :P] = True
        sees[:, :L, P : P + L] = at[:L, None] >= at[:L]
        sees[:, L:, P : P + L] = (at[:L] < lengths[:, None])[:, None]
        sees[:, L:, P + L :] = (answer[:, None] == answer) & (place[:, None] >= place)
        mask = torch.zeros(sees.shape, dtype=prefix[0][0].dtype, device=tokens.device)
        mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
        cache = need("transformers").DynamicCache()
        for i, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), i)
        hidden = run(
            model, cache, input_ids=torch.cat([tokens[:, :L].clamp_min(0), number.expand(B, E)], 1), attention_mask=mask[:, None],
            position_ids=P + torch.cat([at[:L].expand(B, L), lengths[:, None] + place], 1),
        )  # fmt: skip
        last = torch.cat([lengths[:, None] - 1, at[L:].expand(B, E)], 1)
        return hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[2]))

    def score(self, model, hidden):
        """Hidden states (B, 1 + E, C) -> logits (B, A) float32. The first token's log-normaliser, the same for all answers, is left out."""
        head, (answer, _, _, following) = transformer(model).get_output_embeddings(), self.later_tokens
        logits = token_logits(head, hidden[:, 0], self.first_tokens)
        if not len(answer):
            return logits
        logprobs = F.log_softmax(token_logits(head, hidden[:, 1:]), dim=-1)
        return logits.index_add(1, answer, logprobs.gather(2, following.expand(len(hidden), -1)[:, :, None])[:, :, 0])


def run(model, cache, **inputs):
    """-> the hidden states behind the last layer (B, Q, C), while `cache` takes in the keys and values."""
    decoder = transformer(model).get_decoder()
    named = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"  # the older name
    return decoder(use_cache=True, **{named: cache}, **inputs).last_hidden_state


def token_logits(head, hidden, numbers=slice(None)):
    """Hidden states (..., C) -> logits of these tokens, in float32 also where the model computes in bfloat16, which has steps of 1/8 near
    20."""
    bias = getattr(head, "bias", None)
    return F.linear(hidden.float(), head.weight[numbers].float(), None if bias is None else bias[numbers].float())
