"""The flags of `gen2embed search`; they are listed without loading a model's libraries."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.config import CSLS_NEIGHBORS, SCORINGS
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import RemoteOption

CSLS_SAMPLE = 1000


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RemoteOption):
    """What is searched for, where, and how the result is shown."""

    index: str = option("folder that gen2embed encode wrote", needs="the --output_dir of gen2embed encode")
    query: str = option("text that is searched for", default="")
    image: str = option("image file that is searched for; with --query both together", default="")
    top: int = option("rows that are shown", default=10, least=1, most=10_000)
    html: str = option("page to write, with the pictures of the rows", default="")
    scoring: str = option(
        "score of a row; csls subtracts its mean cosine with the nearest of a sample of the index (transductive)",
        default="cosine",
        choices=SCORINGS,
    )
    csls_neighbors: int = option("nearest rows of the sample that csls averages over", default=CSLS_NEIGHBORS, least=1)
    csls_sample: int = option(
        "rows of the index that csls compares with, at even distances", default=CSLS_SAMPLE, least=2
    )
    model_name: str = option("the model, if it is not where the index says", default="")
    any_model: bool = option("search even if the model is not the one that the index was made with", default=False)
    device: str | None = option("cpu, cuda, cuda:1, …", default=None)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range or has no effect, or there is nothing to search for.
        """
        check_options(self)
        self.check_remote()
        if not self.query and not self.image:
            raise Gen2EmbedError("nothing to search for; pass --query, --image, or both")
        if self.html and not self.html.lower().endswith((".html", ".htm")):
            raise Gen2EmbedError(f"html is {self.html}; pass a file that ends in .html, since it is a page")
        if self.remote_images and not self.html:
            raise Gen2EmbedError(
                "remote_images has an effect with --html alone, where pictures are shown; pass it, too"
            )
        if self.scoring != "csls" and (self.csls_neighbors, self.csls_sample) != (CSLS_NEIGHBORS, CSLS_SAMPLE):
            raise Gen2EmbedError(
                "csls_neighbors and csls_sample have an effect with --scoring csls alone; pass it, too"
            )
