"""An embedding file of any program as it lies there: its vectors, and what it says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from library.embedding.files import PAIR, base_of_widths, read_stored
from library.embedding.metadata import TrainingRecord


@dataclass(frozen=True)
class EmbeddingFile:
    """A file's vectors, float32 [N, width] by key, how they were stored, and what the file says of itself."""

    path: Path
    rows: dict[str, Tensor]
    dtypes: dict[str, str]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "EmbeddingFile":
        """Raises UserError for what is no embedding, see ``read_embedding``."""
        stored = read_stored(path)
        return cls(path, stored.rows, stored.dtypes, stored.metadata)

    @property
    def count(self) -> int:
        """Its number of vectors, the same for each encoder."""
        return len(next(iter(self.rows.values())))

    @property
    def is_pair(self) -> bool:
        """Whether its vectors have the names of a model with two text encoders."""
        return set(self.rows) <= set(PAIR)

    @property
    def base(self) -> str:
        """The base that vectors of these widths are for."""
        return base_of_widths({key: rows.shape[1] for key, rows in self.rows.items()})

    @property
    def token(self) -> str:
        """The placeholder token, or the file's name where it says none."""
        return self.metadata.get("ti.token") or self.metadata.get("name") or self.path.stem

    @property
    def record(self) -> TrainingRecord:
        """How it came about, as far as the file says it."""
        known = {
            field.name: value
            for field in fields(TrainingRecord)
            if (value := self.metadata.get(f"ti.{field.name}")) is not None
        }
        return TrainingRecord(**{**known, "token": self.token, "num_vectors": self.count})  # type: ignore[arg-type]  # strings, as they are written again
