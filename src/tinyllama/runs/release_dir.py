"""The folders of releases: path and content of each file. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.files import is_inside, read_json
from tinyllama.runs.jsonl import Row


@dataclass(frozen=True)
class ReleaseDir:
    """A release's folder, `RUN/releases/step-00000100`, or a release outside of any run."""

    path: Path

    @property
    def metadata_path(self) -> Path:
        """File with the lineage and the hash of every file, written last."""
        return self.path / "release.json"

    @property
    def evaluation_path(self) -> Path:
        """File with the scores of the released weights."""
        return self.path / "evaluation.json"

    @property
    def exists(self) -> bool:
        """Whether the folder is a release."""
        return self.metadata_path.is_file()

    def metadata(self) -> Row:
        """Return the content of release.json. Raises InputError if the folder is not a release."""
        metadata = read_json(self.metadata_path) if self.exists else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("files"), dict):
            problem = "a release.json without its files" if self.exists else "no release.json"
            raise InputError(f"{self.path}: no release here ({problem}); create one with `tinyllama release RUN`")
        for name in metadata["files"]:
            if not is_inside(name):
                raise InputError(
                    f"{self.metadata_path}: names {name!r}, a file outside its folder; release the run again"
                )
        return metadata

    def evaluation(self) -> Row | None:
        """Return the content of evaluation.json; None if the file does not exist or belongs to another step."""
        evaluation: Row | None = read_json(self.evaluation_path) if self.evaluation_path.is_file() else None
        return evaluation if evaluation and evaluation["step"] == self.metadata()["step"] else None


@dataclass(frozen=True)
class ReleasesDir:
    """The folder of a run's releases, `RUN/releases`, with the evaluations of the recipe's baselines."""

    path: Path

    @property
    def table_path(self) -> Path:
        """File with one row per release and baseline."""
        return self.path / "releases.json"

    def release(self, name: str) -> ReleaseDir:
        """Return the release with this name, which is the name of its checkpoint; the release may not exist."""
        return ReleaseDir(self.path / name)

    def releases(self) -> list[tuple[ReleaseDir, Row]]:
        """Return the run's releases with their metadata, in the order of their steps."""
        folders = [ReleaseDir(path.parent) for path in self.path.glob("[!.]*/release.json")]
        found = [(folder, folder.metadata()) for folder in folders]
        return sorted((pair for pair in found if pair[1]["step"] is not None), key=lambda pair: pair[1]["step"])

    def table(self) -> dict[str, list[Row]]:
        """Return the rows of releases.json: `releases`, in the order of their tokens, and `baselines`."""
        table: dict[str, list[Row]] = {"releases": [], "baselines": []}
        return read_json(self.table_path) if self.table_path.is_file() else table

    def baseline_path(self, name: str) -> Path:
        """Return the path of a baseline's evaluation; `name` is its folder or its name on the hub."""
        return self.path / "baselines" / f"{name.strip('/').replace('/', '--')}.json"

    def baseline_evaluation(self, name: str) -> Row | None:
        """Return a baseline's evaluation; None if there is no evaluation."""
        path = self.baseline_path(name)
        return read_json(path) if path.is_file() else None

    def baseline_evaluations(self) -> list[Row]:
        """Return the evaluations of all baselines that were scored, in the order of their names."""
        return [read_json(path) for path in sorted(self.path.glob("baselines/*.json"))]

    def files_with_scores(self) -> list[Path]:
        """Return the files that change when the scores of a release or a baseline change."""
        paths = [self.table_path, *self.path.glob("[!.]*/evaluation.json"), *self.path.glob("baselines/*.json")]
        return sorted(path for path in paths if path.is_file())
