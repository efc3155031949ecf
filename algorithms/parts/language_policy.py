"""Causal language models as policies: one says how probable each of some answers is, the other writes answers."""

import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.language_model import (
    TrainedOnly,
    chat,
    check_scores,
    check_tokens,
    embeddings,
    longest_text,
    transformer,
)
from algorithms.parts.packages import need
from harness.options import CommandLineError
from ppo import Policy
from trainer import check_finite


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
            ("prefix", [start + self.tokens_of(prefix)]),
            ("first_tokens", [answer[0] for answer in answers]),
            (
                "later_tokens",
                [*zip(*rest)] if rest else [[]] * 4,
            ),  # of each: its answer, its place there, its number, the number that follows
        ):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.long), persistent=False)

    def check(self, texts):
        """texts: of different lengths, the longest among them.

        Raises CommandLineError for texts that the model cannot read, and for a model whose own forward pass of each
        text scores the answers differently from `read` and `score` of them all: one without a causal mask, or one that
        scales its logits.
        """
        rows = [self.tokens_of(text) for text in texts]
        befores, longest = [self.prefix[0].tolist() + row for row in rows], longest_text(self.model)
        check_tokens(self.model, self.tokenizer, befores + self.answers)
        if max(map(len, befores)) + max(map(len, self.answers)) > longest:
            raise CommandLineError(
                f"the model reads {longest} tokens at most, and the game's texts have more; take another model"
            )
        with torch.no_grad():
            together = self.score(self.model, self.read(self.model, self.padded(rows), self.read_prefix(self.model)))
            alone = [torch.stack([self.logprob(before, answer) for answer in self.answers]) for before in befores]
        check_scores(self.model, F.log_softmax(together, dim=-1) - F.log_softmax(torch.stack(alone), dim=-1))

    def logprob(self, before, answer):
        """Token numbers -> how probable the model's own forward pass says that the answer is behind them."""
        logits = self.model(input_ids=torch.tensor([before + answer], device=self.prefix.device)).logits[
            0, len(before) - 1 : -1
        ]
        return (
            F.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(answer, device=logits.device)[:, None]).sum()
        )

    def tokens_of(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_texts(self, texts, longest):
        """longest: the most tokens that a text may have."""
        tokens = self.padded(self.tokenizer(texts, add_special_tokens=False)["input_ids"], longest)
        return torch.cat([tokens.float(), self.reference_logprobs(tokens)], 1)

    def padded(self, rows, longest=0):
        """Rows of token numbers -> (N, L), -1 behind a shorter one."""
        longest = longest or max(map(len, rows))
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=self.prefix.device)

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
            model,
            cache,
            input_ids=torch.cat([tokens[:, :L].clamp_min(0), number.expand(B, E)], 1),
            attention_mask=mask[:, None],
            position_ids=P + torch.cat([at[:L].expand(B, L), lengths[:, None] + place], 1),
        )
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


class Writer(TrainedOnly):
    """A causal language model that draws answers and says how probable their tokens are. Dropout is never on."""

    def __init__(self, model, tokenizer, temperature=1.0, top_p=1.0):
        """Raises CommandLineError for a model without an end token."""
        super().__init__()
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        ends = transformer(model).generation_config.eos_token_id  # often more than the tokenizer's: that of a turn
        known = range(embeddings(model))  # nothing else can be drawn
        self.ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} & set(known))
        if not self.ends:
            raise CommandLineError("the model has no end token; take another model")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id in known else self.ends[0]
        # The model's own settings would change what is drawn, and not the log-probabilities
        transformer(model).generation_config = need("transformers").GenerationConfig(
            do_sample=True, temperature=temperature, top_p=top_p, top_k=0, eos_token_id=self.ends, pad_token_id=self.pad
        )

    def prompt_rows(self, prompts):
        """Texts -> token numbers, a list for each."""
        if self.tokenizer.chat_template:
            settings = {"add_generation_prompt": True, "enable_thinking": False}  # Qwen3 would think first
            texts = [chat(self.tokenizer, prompt, **settings) for prompt in prompts]
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = self.tokenizer(prompts)["input_ids"]
        for row in rows:  # some tokenizers close all that they read, and an answer would begin behind its end
            while len(row) > 1 and row[-1] in (*self.ends, *self.tokenizer.all_special_ids):
                row.pop()
        return rows

    def prompt_tokens(self, prompts):
        """Texts -> token numbers (N, P) and which are no padding, on the left, (N, P) int64."""
        rows = self.prompt_rows(prompts)
        longest = max(map(len, rows))
        tokens = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return tokens.to(self.model.device), mask.to(self.model.device)

    def check(self, prompts, max_new_tokens):
        """prompts: all that there will be.

        Raises CommandLineError for a model that cannot read them, or that scores or draws several texts otherwise than
        it scores each alone: a recurrent model that ignores the mask, for example, or one without a causal mask.
        """
        rows, longest = self.prompt_rows(prompts), longest_text(self.model)
        check_tokens(self.model, self.tokenizer, rows)
        room = longest - max(map(len, rows))
        if max_new_tokens > room:
            consequence = f"so MAX_NEW_TOKENS must be {room} or less, not {max_new_tokens}"
            if room < 1:
                consequence = "too few for the prompts; take another model"
            raise CommandLineError(f"the model reads {longest} tokens at most, {consequence}")
        tokens, mask = self.prompt_tokens(["Hi", max(prompts, key=len)])
        with torch.no_grad():
            written = self.generate(tokens, mask, 4, do_sample=False, output_logits=True, return_dict_in_generate=True)
            tokens, T = written.sequences, len(written.logits)
            drawn = until_end(tokens[:, -T:], self.ends)
            seen = torch.cat([mask, drawn.long()], 1)
            when_drawn = self.token_logprobs(torch.stack(written.logits, 1), tokens[:, -T:])
            together = self.logprobs(self.model, tokens, seen, T)
            for i, length in enumerate(drawn.sum(1)):
                alone = tokens[i][seen[i].bool()][None]
                logits = self.model(input_ids=alone).logits[:, -length - 1 : -1]
                expected = self.token_logprobs(logits, alone[:, -length:])[0]
                for found in when_drawn, together:
                    # Differences at a low temperature are larger, and mean no more
                    check_scores(self.model, self.temperature * (found[i, :length] - expected))

    @torch.no_grad()
    def write(self, prompts, max_new_tokens):
        """-> tokens (N, P + T), which of them may be seen (N, P + T) int64, and which were drawn (N, T) bool.

        Drawn are those up to the first end token, and it.
        """
        tokens, mask = self.prompt_tokens(prompts)
        written = self.generate(tokens, mask, max_new_tokens, logits_processor=[drawable])
        drawn = until_end(written[:, tokens.shape[1] :], self.ends)
        return written, torch.cat([mask, drawn.long()], 1), drawn

    def generate(self, tokens, mask, max_new_tokens, **more):
        return self.model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **more)

    def texts(self, tokens, drawn):
        """Tokens (N, P + T), (N, T) bool -> the answers."""
        answers = tokens[:, -drawn.shape[1] :]
        return [self.tokenizer.decode(row[is_drawn], skip_special_tokens=True) for row, is_drawn in zip(answers, drawn)]

    def logprobs(self, model, tokens, mask, T):
        """Of the last T tokens of (N, P + T) -> (N, T) float32. Positions leave out padding, which changes nothing."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=T + 1
        ).logits
        return self.token_logprobs(logits[:, -T - 1 : -1], tokens[:, -T:])

    def token_logprobs(self, logits, tokens):
        """(N, T, V), (N, T) -> (N, T) float32."""
        return F.log_softmax(logits.float() / self.temperature, dim=-1).gather(2, tokens[:, :, None])[:, :, 0]


def drawable(tokens, logits):
    """-> the logits (N, V). Raises FloatingPointError if nothing can be drawn from them; some may be minus infinity."""
    check_finite("in an answer", logits=logits.logsumexp(-1))
    return logits


def until_end(answers, ends):
    """Tokens (N, T), end tokens -> (N, T) bool: those up to the first end token, and it."""
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
    return ended.cumsum(1) - ended == 0
