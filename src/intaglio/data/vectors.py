"""Named vectors written row by row in constant memory, as safetensors or Parquet."""

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np


class VectorFile:
    """Rows of ``width`` float32 with a name each, streamed to ``path``; the file appears when it is whole.

    ``.safetensors`` holds the tensor ``latents`` (N, width), with the names as a JSON list in its metadata;
    ``.parquet`` the columns ``file`` and ``latent``.

    Raises:
        ValueError: another ending.
    """

    def __init__(self, path: Path, width: int):
        if path.suffix not in {".safetensors", ".parquet"}:
            raise ValueError(f"{path}: the file must end in .safetensors or .parquet.")
        self.path, self.width, self.rows = path, width, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
        self._raw = (self._work / "rows").open("wb")
        self._names = (self._work / "names").open("w", encoding="utf-8")

    def append(self, names: list[str], vectors: np.ndarray) -> None:
        """Adds rows; ``vectors`` (len(names), width)."""
        assert vectors.shape == (len(names), self.width)
        if self.path.suffix == ".parquet":
            import polars as pl

            table = pl.DataFrame({"file": names, "latent": vectors.astype(np.float32)})
            table.write_parquet(self._work / f"{self.rows:012d}.parquet")
        else:
            self._raw.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
            self._names.writelines(json.dumps(n) + "\n" for n in names)
        self.rows += len(names)

    def __enter__(self) -> "VectorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._raw.close()
        self._names.close()
        try:
            if kind is None:
                (self._finish_parquet if self.path.suffix == ".parquet" else self._finish_safetensors)()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _finish_parquet(self) -> None:
        import polars as pl

        if self.rows == 0:
            raise ValueError("No image could be read, so there is nothing to write.")
        part = self._work / "whole"
        pl.scan_parquet(self._work / "*.parquet").sink_parquet(part)
        part.replace(self.path)

    def _finish_safetensors(self) -> None:
        """Header length, header, rows: the format's own layout, so that the rows never stand in memory together."""
        if self.rows == 0:
            raise ValueError("No image could be read, so there is nothing to write.")
        names = [json.loads(line) for line in (self._work / "names").read_text(encoding="utf-8").splitlines()]
        entry = {"dtype": "F32", "shape": [self.rows, self.width], "data_offsets": [0, self.rows * self.width * 4]}
        header = json.dumps({"__metadata__": {"files": json.dumps(names)}, "latents": entry}).encode()
        header += b" " * (-len(header) % 8)
        part = self._work / "whole"
        with part.open("wb") as whole, (self._work / "rows").open("rb") as raw:
            whole.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(raw, whole)
        part.replace(self.path)
