"""Causal language models as policies: `LanguagePolicy` scores a few given answers, `Writer` draws its own answers."""

import inspect
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.language_model import (
    TrainedOnly,
    base_model,
    chat,
    check_scores,
    check_tokens,
    longest_input,
    vocabulary_size,
)
from algorithms.parts.packages import need
from harness.messages import shortened
from harness.options import CommandLineError
from ppo import Policy
from trainer import check_finite


class LanguagePolicy(TrainedOnly, Policy):
    """Chooses one of A answers to a text, which follows a prefix that never changes.

    The logits (N, A) are the log-probabilities of the answers, up to a constant; the values are (N,). A subclass
    defines `encode(obs)` by `encode_texts`, which returns (N, L + A) float32: the tokens of each text, padded with -1,
    and the log-probabilities of the answers according to the reference, or 0 if there is none. The model has no
    dropout, so that the policy that acts is the one that learns.

    The prefix is read once, and its keys and values are reused for every text. One forward pass scores all answers:
    their tokens follow the text, and each of these tokens sees the text and its own answer, but no other answer.
    """

    def __init__(self, model, tokenizer, prefix, answers, reference=None):
        """
        Args:
            model: of peft or transformers, in eval mode.
            reference: a function that returns a context manager for the model to compare with, see `reference_of`.

        Raises CommandLineError if the tokenizer cannot tell the answers apart.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference
        self.reference_prefix = None
        self.value_head = nn.Linear(base_model(model).config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.answers = [self.tokens_of(answer) for answer in answers]
        if len({tuple(answer) for answer in self.answers}) < len(self.answers):
            raise CommandLineError("the model's tokenizer cannot tell the answers apart; take another model")
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.add_tokens("prefix", [start + self.tokens_of(prefix)])  # (1, P)
        self.add_tokens("first_tokens", [answer[0] for answer in self.answers])  # (A,)
        # The hidden state of a token scores the token after it. So an answer's first token is scored by the last token
        # of the text, and an answer's last token is never read. E tokens of all answers together are read. For each:
        # which answer it belongs to, its place in that answer, the token itself, and the token after it.
        places = [(i, place) for i, answer in enumerate(self.answers) for place in range(len(answer) - 1)]
        answer_tokens = [
            [i for i, place in places],
            [place for i, place in places],
            [self.answers[i][place] for i, place in places],
            [self.answers[i][place + 1] for i, place in places],
        ]
        self.add_tokens("answer_tokens", answer_tokens)  # (4, E)

    def add_tokens(self, name, numbers):
        """Keep a tensor of token numbers that moves with the module to another device, and is not saved."""
        self.register_buffer(name, torch.tensor(numbers, dtype=torch.long), persistent=False)

    # --- what PPO calls -----------------------------------------------------------------------------------------------

    def encode_texts(self, texts, longest):
        """Texts as PPO stores them, (N, longest + A) float32; no text may have more than `longest` tokens."""
        tokens = self.padded(self.tokenizer(texts, add_special_tokens=False)["input_ids"], longest)
        return torch.cat([tokens.float(), self.reference_logprobs(tokens)], 1)

    def split(self, encoded):
        """The tokens (N, L) and the reference's log-probabilities (N, A) in encoded texts."""
        num_answers = len(self.first_tokens)
        return encoded[:, :-num_answers].long(), encoded[:, -num_answers:]

    def features(self, encoded):
        tokens, _ = self.split(encoded)
        return self.read(self.model, tokens, self.read_prefix(self.model))

    def heads(self, hidden):
        return self.score(self.model, hidden), self.value_head(hidden[:, 0].float()).squeeze(-1)

    def inference_function(self):
        with torch.no_grad():
            prefix = self.read_prefix(self.model)

        @torch.no_grad()
        def act(encoded):
            tokens, _ = self.split(encoded)
            return self.heads(self.read(self.model, tokens, prefix))

        return act

    # --- reading and scoring ------------------------------------------------------------------------------------------

    def tokens_of(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def padded(self, rows, longest):
        """Lists of tokens as a tensor (N, longest); shorter lists are filled up with -1."""
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=self.prefix.device)

    @torch.no_grad()
    def reference_logprobs(self, tokens):
        """The log-probabilities of the answers (N, A) according to the reference; 0 without a reference."""
        if self.reference is None:
            return torch.zeros(len(tokens), len(self.first_tokens), device=tokens.device)
        with self.reference() as model:
            if self.reference_prefix is None:
                self.reference_prefix = self.read_prefix(model)
            return F.log_softmax(self.score(model, self.read(model, tokens, self.reference_prefix)), dim=-1)

    def read_prefix(self, model):
        """The keys and values of the prefix, a pair of tensors (1, heads, P, D) for each layer."""
        cache = need("transformers").DynamicCache()
        run(model, cache, input_ids=self.prefix)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def read(self, model, tokens, prefix):
        """Read texts after the prefix, and the tokens of all answers after each text.

        Args:
            tokens: (B, L), padded with -1.
            prefix: what `read_prefix` returned.

        Returns hidden states (B, 1 + E, C): of the last token of each text, and of the E tokens of `answer_tokens`.
        """
        _, place, answer_tokens, _ = self.answer_tokens
        lengths = (tokens >= 0).sum(1)
        B, L, E = len(tokens), int(lengths.max()), len(answer_tokens)
        P = self.prefix.shape[1]
        cache = need("transformers").DynamicCache()
        for i, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), i)
        at = torch.arange(L + E, device=tokens.device)
        # Answers stand after the padding of their text, but their positions are those right after the text.
        hidden = run(
            model,
            cache,
            input_ids=torch.cat([tokens[:, :L].clamp_min(0), answer_tokens.expand(B, E)], 1),
            attention_mask=self.attention_mask(lengths, L, P, dtype=keys.dtype),
            position_ids=P + torch.cat([at[:L].expand(B, L), lengths[:, None] + place], 1),
        )
        wanted = torch.cat([lengths[:, None] - 1, at[L:].expand(B, E)], 1)  # (B, 1 + E), places in the sequence
        return hidden.gather(1, wanted[:, :, None].expand(-1, -1, hidden.shape[2]))

    def attention_mask(self, lengths, L, P, dtype):
        """The mask (B, 1, L + E, P + L + E) that is added to attention scores: 0 where a token sees another.

        Every token sees the prefix. A token of a text sees the text up to itself. A token of an answer sees the whole
        text, without the padding, and its own answer up to itself.
        """
        answer, place, _, _ = self.answer_tokens
        B, E = len(lengths), len(answer)
        at = torch.arange(L, device=lengths.device)
        sees = torch.zeros(B, L + E, P + L + E, dtype=torch.bool, device=lengths.device)
        sees[:, :, :P] = True
        sees[:, :L, P : P + L] = at[:, None] >= at
        sees[:, L:, P : P + L] = (at < lengths[:, None])[:, None]
        sees[:, L:, P + L :] = (answer[:, None] == answer) & (place[:, None] >= place)
        mask = torch.zeros(sees.shape, dtype=dtype, device=lengths.device)
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]

    def score(self, model, hidden):
        """The logits (B, A) float32 of the answers, from hidden states (B, 1 + E, C).

        The normaliser of the first token is left out, because it is the same for all answers.
        """
        answer, _, _, next_tokens = self.answer_tokens
        head = base_model(model).get_output_embeddings()
        logits = token_logits(head, hidden[:, 0], self.first_tokens)
        if not len(answer):
            return logits
        logprobs = F.log_softmax(token_logits(head, hidden[:, 1:]), dim=-1)  # (B, E, V)
        logprobs = logprobs.gather(2, next_tokens.expand(len(hidden), -1)[:, :, None])[:, :, 0]  # (B, E)
        return logits.index_add(1, answer, logprobs)

    # --- checks -------------------------------------------------------------------------------------------------------

    def check(self, texts):
        """Check that the model can read these texts, and scores them side by side as it does each one alone.

        Raises CommandLineError for texts that the model cannot read, and for a model whose own forward pass of each
        text scores the answers differently from `read` and `score`, for instance because it has no causal mask or
        scales its logits.

        texts: of different lengths, the longest among them.
        """
        rows = [self.tokens_of(text) for text in texts]
        befores = [self.prefix[0].tolist() + row for row in rows]
        check_tokens(self.model, self.tokenizer, befores + self.answers)
        limit = longest_input(self.model)
        if longest_of(befores) + longest_of(self.answers) > limit:
            reason = f"the model reads {limit} tokens at most, and the game's texts have more"
            raise CommandLineError(f"{reason}; take another model")
        with torch.no_grad():
            tokens = self.padded(rows, longest_of(rows))
            together = self.score(self.model, self.read(self.model, tokens, self.read_prefix(self.model)))
            alone = torch.stack([self.logprobs_alone(before) for before in befores])
        check_scores(self.model, F.log_softmax(together, dim=-1) - F.log_softmax(alone, dim=-1))

    def logprobs_alone(self, before):
        """The log-probabilities of the answers (A,) after these tokens, by a forward pass of the model for each."""
        logprobs = []
        for answer in self.answers:
            inputs = torch.tensor([before + answer], device=self.prefix.device)
            logits = self.model(input_ids=inputs).logits[0, len(before) - 1 : -1]
            numbers = torch.tensor(answer, device=logits.device)
            logprobs.append(F.log_softmax(logits.float(), dim=-1).gather(1, numbers[:, None]).sum())
        return torch.stack(logprobs)


def longest_of(rows):
    return max(len(row) for row in rows)


def run(model, cache, **inputs):
    """The hidden states (B, Q, C) after the last layer. The keys and values are added to `cache`."""
    decoder = base_model(model).get_decoder()
    parameters = inspect.signature(decoder.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # the latter is the older name
    return decoder(use_cache=True, **{name: cache}, **inputs).last_hidden_state


def token_logits(head, hidden, tokens=slice(None)):
    """The logits of some tokens for hidden states (..., C).

    They are computed in float32 even if the model is in bfloat16, which has steps of 1/8 near 20.
    """
    bias = getattr(head, "bias", None)
    if bias is not None:
        bias = bias[tokens].float()
    return F.linear(hidden.float(), head.weight[tokens].float(), bias)


class Written(NamedTuple):
    """N prompts and the answers to them that `Writer.write` has drawn, of which the longest has T tokens."""

    tokens: torch.Tensor  # (N, P + T), the prompts, padded on the left, and the answers
    mask: torch.Tensor  # (N, P + T) int64, 0 for the padding before a prompt and for what follows the end of an answer
    drawn: torch.Tensor  # (N, T) bool, True for the tokens of the answer up to and including its first end token
    logprobs: torch.Tensor  # (N, T) float32, of the tokens when they were drawn, at the writer's temperature
    entropy: torch.Tensor  # (N, T) float32, of the distribution that each token was drawn from, without TOP_P

    def split(self, size):
        """The same in parts of at most `size` answers; of all if it is 0."""
        parts = [x.split(size or len(self.tokens)) for x in self]
        return [Written(*part) for part in zip(*parts)]


class Writer(TrainedOnly):
    """A causal language model that draws answers to prompts, and computes the log-probabilities of their tokens.

    The model has no dropout, so that the one that writes is the one that learns.
    """

    bf16 = False  # whether products are computed in bfloat16; weights and sums of log-probabilities remain as they are

    def __init__(self, model, tokenizer, temperature=1.0, top_p=1.0):
        """Raises CommandLineError for a model without an end token."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        ends = base_model(model).generation_config.eos_token_id  # often with the one that ends a turn in a chat
        if not isinstance(ends, list):
            ends = [ends]
        known = range(vocabulary_size(model))  # no other token can be drawn
        self.ends = sorted({tokenizer.eos_token_id, *ends} & set(known))
        if not self.ends:
            raise CommandLineError("the model has no end token; take another model")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id in known else self.ends[0]
        # The model's own settings would change what is drawn, but not the log-probabilities.
        self.own_settings = base_model(model).generation_config
        base_model(model).generation_config = need("transformers").GenerationConfig(
            do_sample=True, temperature=temperature, top_p=top_p, top_k=0, eos_token_id=self.ends, pad_token_id=self.pad
        )

    @torch.no_grad()
    def write(self, prompts, max_new_tokens, report=None):
        """Draw an answer to each prompt, and return them as `Written`.

        report: called before each token of the answers, with how many tokens there are and how many there may be.
        """
        tokens, mask = self.prompt_tokens(prompts)
        longest_prompt = tokens.shape[1]
        record = Record(self.temperature)

        def watched(tokens, logits):
            if report is not None:
                report(tokens.shape[1] - longest_prompt, max_new_tokens)
            return record(tokens, logits)

        written = self.generate(tokens, mask, max_new_tokens, logits_processor=[watched])
        record.note(written)
        drawn = until_end(written[:, longest_prompt:], self.ends)
        mask = torch.cat([mask, drawn.long()], 1)
        return Written(written, mask, drawn, torch.stack(record.logprobs, 1), torch.stack(record.entropy, 1))

    def generate(self, tokens, mask, max_new_tokens, **more):
        with self.precision():
            return self.model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **more)

    def precision(self):
        """The context in which the model computes."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def prompt_tokens(self, prompts):
        """The tokens of prompts, padded on the left, and the mask, which is 0 for padding; both (N, P) int64."""
        rows = self.prompt_rows(prompts)
        longest = longest_of(rows)
        tokens = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return tokens.to(self.model.device), mask.to(self.model.device)

    def prompt_rows(self, prompts):
        """The tokens of prompts, a list for each, in the form of the tokenizer's chat template if there is one."""
        if self.tokenizer.chat_template:
            settings = {"add_generation_prompt": True, "enable_thinking": False}  # Qwen3 would think first
            texts = [chat(self.tokenizer, prompt, **settings) for prompt in prompts]
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = self.tokenizer(prompts)["input_ids"]
        # Some tokenizers append an end token to every text, and the answer would begin after it.
        closing = {*self.ends, *self.tokenizer.all_special_ids}
        for row in rows:
            while len(row) > 1 and row[-1] in closing:
                row.pop()
        return rows

    def texts(self, written):
        """The answers as texts."""
        answers = written.tokens[:, -written.drawn.shape[1] :]
        pairs = zip(answers, written.drawn)
        return [self.tokenizer.decode(row[is_drawn], skip_special_tokens=True) for row, is_drawn in pairs]

    def ended(self, written):
        """Which answers have an end token, (N,) bool; the others were cut off."""
        answers = written.tokens[:, -written.drawn.shape[1] :]
        return torch.isin(answers, torch.tensor(self.ends, device=answers.device)).any(1)

    def logprobs(self, model, tokens, mask, T):
        """The log-probabilities (N, T) float32 of the last T tokens of (N, P + T), at the writer's temperature."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)  # those of padding do not matter, because it is masked
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        with self.precision():
            logits = model(**inputs, use_cache=False, logits_to_keep=T + 1).logits
        return self.token_logprobs(logits[:, -T - 1 : -1], tokens[:, -T:])

    def token_logprobs(self, logits, tokens):
        """The log-probabilities of tokens (N, T) according to logits (N, T, V), at the writer's temperature."""
        return F.log_softmax(logits.float() / self.temperature, dim=-1).gather(2, tokens[:, :, None])[:, :, 0]

    def check(self, prompts, max_new_tokens):
        """Check that the model can read these prompts, and draws and scores texts side by side as it does each alone.

        Raises CommandLineError if it does not, for instance because it is a recurrent model that ignores the mask, or
        because it has no causal mask.

        prompts: all that there will be.
        """
        rows = self.prompt_rows(prompts)
        check_tokens(self.model, self.tokenizer, rows)
        limit = longest_input(self.model)
        longest = max(rows, key=len)
        room = limit - len(longest)
        prompt = shortened(prompts[rows.index(longest)], 60)
        reason = f"the model reads {limit} tokens at most, and the prompt {prompt!r} has {len(longest)}"
        if room < 1:
            raise CommandLineError(f"{reason}; shorten it, or take another model")
        if max_new_tokens > room:
            raise CommandLineError(f"{reason}, so MAX_NEW_TOKENS must be {room} or less, not {max_new_tokens}")
        with torch.no_grad():
            self.check_together_and_alone(["Hi", max(prompts, key=len)])

    def check_together_and_alone(self, prompts):
        """Raises CommandLineError unless answers to these prompts are scored as in a forward pass of each alone."""
        tokens, mask = self.prompt_tokens(prompts)
        written = self.generate(tokens, mask, 4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens = written.sequences
        T = len(written.logits)
        drawn = until_end(tokens[:, -T:], self.ends)
        seen = torch.cat([mask, drawn.long()], 1)
        when_drawn = self.token_logprobs(torch.stack(written.logits, 1), tokens[:, -T:])
        together = self.logprobs(self.model, tokens, seen, T)
        for i, length in enumerate(drawn.sum(1)):
            alone = tokens[i][seen[i].bool()][None]
            logits = self.model(input_ids=alone).logits[:, -length - 1 : -1]
            expected = self.token_logprobs(logits, alone[:, -length:])[0]
            for found in (when_drawn, together):
                # At a low temperature the same rounding makes a larger difference.
                check_scores(self.model, self.temperature * (found[i, :length] - expected))


class Record:
    """Notes how probable the tokens are that `generate` draws, and the entropy of what it draws them from.

    It is a logits processor: `generate` calls it before each token, with the tokens so far (N, L) and the logits (N, V)
    of the next one, to which neither the temperature nor TOP_P has been applied yet. Raises FloatingPointError if
    nothing can be drawn from those.
    """

    def __init__(self, temperature):
        self.temperature = temperature
        self.logprobs = []  # (N,) of each token
        self.entropy = []  # (N,) of each token
        self.of_next = None  # log-probabilities (N, V) of the token that is drawn next

    def __call__(self, tokens, logits):
        check_finite("in an answer", logits=logits.logsumexp(-1))  # one token alone may have minus infinity
        self.note(tokens)
        self.of_next = F.log_softmax(logits.float() / self.temperature, dim=-1)
        self.entropy.append(torch.special.entr(self.of_next.exp()).sum(-1))
        return logits

    def note(self, tokens):
        """Note how probable the last of these tokens was, if it was drawn."""
        if self.of_next is not None:
            self.logprobs.append(self.of_next.gather(1, tokens[:, -1:])[:, 0])


def until_end(answers, ends):
    """Which tokens of answers (N, T) come no later than the first end token: (N, T) bool."""
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
    return ended.cumsum(1) - ended == 0
