"""Sampling flags of `promoe generate` and `promoe chat`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from promoe.generation import GenerateOptions


@dataclass(frozen=True)
class SamplingFlags:
    """What is None is left to the server's default."""

    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Tokens to generate at most.")] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 is greedy (the default), up to 5.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from this probability mass only, up to 1.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0 discourages words of the answer so far.")] = (
        None
    )
    frequency_penalty: Annotated[float | None, typer.Option(help="Likewise, for each time they came.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None

    def generate_options(self) -> GenerateOptions:
        """For the client."""
        options = GenerateOptions()
        if self.max_tokens is not None:
            options["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.top_k is not None:
            options["top_k"] = self.top_k
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.seed is not None:
            options["seed"] = self.seed
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.presence_penalty is not None:
            options["presence_penalty"] = self.presence_penalty
        if self.frequency_penalty is not None:
            options["frequency_penalty"] = self.frequency_penalty
        if self.stop:
            options["stop_strings"] = self.stop
        return options
