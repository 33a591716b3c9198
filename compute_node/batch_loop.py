"""Transformers' continuous batching loop with our ends attached: sampling, delivery, step marks, failures.

Works with Transformers 5.17 to 5.23, whose differences are all in `build_batch_loop`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput
from transformers.generation.logits_process import LogitsProcessorList

from compute_node.batch_requests import BatchRequests
from compute_node.engine import StepObserver
from compute_node.running_request import STEP_FAILURES, step_failure
from compute_node.sampling import SampledToken
from promoe.errors import PromoeError

KV_BLOCK_TOKENS: Final = 32
"""Tokens of one KV block; shared prefixes are multiples of it."""


@dataclass(frozen=True)
class BatchLimits:
    """What one step may hold, from the memory plan.

    Attributes:
        num_kv_blocks: blocks of `KV_BLOCK_TOKENS` tokens, over all requests.
        max_batch_tokens: tokens of one step, prefill included.
        max_concurrent_requests: requests of one step.
        share_prefixes: reuse the KV blocks of equal prompt beginnings.
    """

    num_kv_blocks: int
    max_batch_tokens: int
    max_concurrent_requests: int
    share_prefixes: bool = True


class _RowSampling(ContinuousBatchingLogitsProcessor):
    """Replaces a sampled row's scores by the token that was drawn, so that Transformers' argmax takes it.

    Rows are the requests with a new token in the order of `prepare_tensor_args`; where some requests are in the middle
    of their prefill, surplus rows follow and are nobody's.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - declared so by Transformers
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, draw: Callable[[str, torch.Tensor], SampledToken | None]) -> None:
        self._draw = draw
        self._request_ids: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """This processor's arguments are not tensors; the storage is left zero."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Remembers whose rows the step will make."""
        self._request_ids = tuple(future.state.request_id for future in requests_with_new_token)
        return torch.zeros(len(self._request_ids), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Takes float32 scores of shape (rows, V)."""
        for row, request_id in enumerate(self._request_ids):
            token = self._draw(request_id, scores[row])
            if token is not None:
                scores[row].fill_(-torch.inf)
                scores[row, token.token_id] = 0.0
        return scores


class _Router(OutputRouter):
    """Hands every output to the engine on its own thread."""

    def __init__(self, deliver: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        """One output."""
        self._deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """The outputs of one step."""
        for output in outputs:
            self._deliver(output)


class BatchLoop(ContinuousBatchingManager):
    """Transformers' manager, whose thread runs the steps; `build_batch_loop` makes it."""

    def attach(self, requests: BatchRequests, observe_step: StepObserver, on_end: Callable[[], None]) -> None:
        """Attaches our ends; must be called before `start`.

        Args:
            requests: whose tokens are drawn and delivered.
            observe_step: told each step's phase and seconds.
            on_end: called by the thread as its last act, whatever ended it.
        """
        self._requests = requests
        self._observe_step = observe_step
        self._on_end = on_end
        self.output_router = _Router(requests.deliver)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_RowSampling(requests.draw)]))
        processors.tensors_required = 1
        self.logit_processor = processors

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        for request_id in self._requests.take_cancelled():
            # Transformers frees its blocks when it prepares the next step, which is what comes next.
            self.cancel_request(request_id)
            _admit_waiting(batch_processor)
        try:
            return bool(super()._generation_loop_body(batch_processor, bootstrapping))
        except _StepFailed as failed:
            error = failed.error
            # The forward pass raised, so no block of this step was marked complete: none of it can be shared.
            self._requests.fail_step(_rows_of(batch_processor), step_failure(error))
            batch_processor.handle_batch_error(error)
            _admit_waiting(batch_processor)
            return True

    def _generation_step(self) -> None:
        assert self.batch_processor is not None, "a step without a batch"
        phase = self._requests.begin_step(_rows_of(self.batch_processor))
        started_s = perf_counter()
        try:
            super()._generation_step()
        except STEP_FAILURES as error:
            raise _StepFailed(error) from error
        finally:
            self._requests.end_step()
            self._observe_step(phase, perf_counter() - started_s)

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._on_end()


class _StepFailed(Exception):
    """The forward pass of one step raised; anything that is raised around it ends the engine."""

    def __init__(self, error: PromoeError | torch.OutOfMemoryError) -> None:
        super().__init__(str(error))
        self.error = error


def _admit_waiting(batch_processor: ContinuousBatchProcessor) -> None:
    """Transformers lets nobody in between taking KV blocks from a request and the next *finish*: it does not count
    requests that leave otherwise, and would wait for ever when the last one did."""
    batch_processor.scheduler.block_new_requests = False


def _rows_of(batch_processor: ContinuousBatchProcessor) -> list[FutureRequestState]:
    """The step's requests in the order of their rows; without padding there are no other rows."""
    step_tensors = batch_processor.inputs_and_outputs
    assert isinstance(step_tensors, ContinuousBatchingIOs), "double buffering is off"
    return list(step_tensors.requests_in_batch)


def build_batch_loop(model: PreTrainedModel, limits: BatchLimits) -> BatchLoop:
    """Builds the loop: no CUDA graphs and no double buffering, since the experts function syncs in every layer."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    has_pages = "page_size" in known
    config = ContinuousBatchingConfig(
        num_blocks=limits.num_kv_blocks if has_pages else limits.num_kv_blocks * _num_layer_groups(model),
        max_batch_tokens=limits.max_batch_tokens,
        max_requests_per_batch=limits.max_concurrent_requests,
        max_blocks_per_request=0,
        allow_block_sharing=limits.share_prefixes,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    setattr(config, "page_size" if has_pages else "block_size", KV_BLOCK_TOKENS)
    if "auto_switch_to_flash" in known:
        config.auto_switch_to_flash = False
    elif not model.config._attn_implementation.startswith("paged|"):
        # Older releases have names for the paged forms; naming one keeps them from looking for flash kernels.
        model.set_attn_implementation(f"paged|{model.config._attn_implementation}")
    with torch.no_grad():
        return BatchLoop(
            # Typed as Transformers' own stand-in for PreTrainedModel.
            model=model,  # type: ignore[arg-type]
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=config,
        )


def _num_layer_groups(model: PreTrainedModel) -> int:
    """How many blocks older releases take where newer ones take one.

    Their blocks hold one group of layers of the same attention type, all groups being equally large.
    """
    config = model.config.get_text_config()
    # Optional in Transformers' configurations: without it all layers are alike.
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    num_layers_of_type = Counter(layer_types).values()
    return len(layer_types) // math.gcd(*num_layers_of_type) if layer_types else 1
