"""What became of the bytes that were loaded before they were needed."""

from dataclasses import dataclass


@dataclass
class PrefetchCounters:
    """Counted by the expert cache since the start; see `PrefetchStats` in inference.proto.

    What is neither used nor evicted yet is in none of the first three.

    Attributes:
        useful_nbytes: arrived before its layer's routing was known, and was routed.
        late_nbytes: routed, but still under way then.
        wasted_nbytes: evicted, or dropped half way, without having been routed.
        streamed_nbytes: layers of a prefill loaded in order, without a predictor; in none of the three above.
    """

    useful_nbytes: int = 0
    late_nbytes: int = 0
    wasted_nbytes: int = 0
    streamed_nbytes: int = 0
