"""`POST /v1/completions`: what is asked for."""

from typing import Final

from pydantic import field_validator, model_validator

from compute_node.http.request_fields import AnswerFields
from compute_node.prompt import Prompt, TextPrompt, TokenPrompt
from compute_node.sampling import MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS: Final = 16
"""As in OpenAI's API reference."""

MAX_PROMPTS: Final = 128


class CompletionFields(AnswerFields):
    """Prompts to go on with: a text, token ids, or a list of either."""

    prompt: list[str] | list[list[int]]
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def list_prompts(cls, prompt: object) -> object:
        """One prompt is a list of one."""
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise ValueError("prompt is not a text, a list of texts, a list of token ids, or a list of such lists")
        prompts = [prompt] if all(_is_token_id(each) for each in prompt) else prompt
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt has {len(prompts)} entries; allowed: at most {MAX_PROMPTS}")
        is_texts = all(isinstance(each, str) for each in prompts)
        if not is_texts and not all(isinstance(each, list) and all(map(_is_token_id, each)) for each in prompts):
            raise ValueError("prompt has entries that are neither all texts nor all lists of token ids")
        return prompts

    @model_validator(mode="after")
    def check_together(self) -> "CompletionFields":
        """What has a range, or only makes sense with something else."""
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; allowed: 0 to {MAX_TOP_LOGPROBS}")
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is {self.best_of}; allowed: the value of n, {self.n}")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo is true; allowed with logprobs: false")
        return self

    def prompts(self) -> list[Prompt]:
        """In the order of the answers."""
        return [TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt)) for prompt in self.prompt]


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
