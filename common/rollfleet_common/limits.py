"""Caps on one rollout: what costs more to check and to collate than its bytes suggest."""

from dataclasses import dataclass

from rollfleet_common.errors import OversizeError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest rollout that is taken; trainers and workers each have their own settings."""

    #: Training sequences of one rollout: the rows that it adds to a batch.
    samples: int = 4096
    #: Tokens of one sequence: the width that all rows of a padded batch get.
    tokens: int = 1 << 20
    #: Version spans and runs of the loss mask, over all sequences of a rollout.
    spans: int = 1 << 16
    #: Names of components, metrics and arrays of one sequence.
    names: int = 1024

    def check(self, *, samples: int = 0, tokens: int = 0, spans: int = 0, names: int = 0) -> None:
        """Refuse what is over a cap.

        Raises:
            OversizeError: The message says which cap, by how much, and the setting that raises it.
        """
        for found, cap, what, setting in (
            (samples, self.samples, "sequences in one rollout", "max_rollout_samples"),
            (tokens, self.tokens, "tokens in one sequence", "max_sample_tokens"),
            (spans, self.spans, "version spans and mask runs in one rollout", "max_rollout_spans"),
            (names, self.names, "named numbers and arrays in one sequence", "max_names"),
        ):
            if found > cap:
                raise OversizeError(f"{found:,} {what}, over the cap of {cap:,} ({setting})")
