"""Options of opening images that several configurations have, each with its help text in one place."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.flags import option

REMOTE_HELP = (
    "where images may be read from by address: protocols that fsspec knows (s3, gs, hf, https, …), or beginnings of "
    "addresses, such as s3://bucket/ (default: nowhere; a path in the data is one of a local file)"
)


@dataclass(frozen=True, kw_only=True)
class LinkOption:
    """Whether links in an image folder may lead out of it."""

    follow_links: bool = option("follow links in the image folder that lead out of it", default=False)


@dataclass(frozen=True, kw_only=True)
class RemoteOption:
    """Which images may be read from other machines."""

    remote_images: tuple[str, ...] = option(REMOTE_HELP, default=())

    def check_remote(self) -> None:
        """Check that what is named can be read.

        Raises:
            Gen2EmbedError: A protocol is never read, or cannot be read here.
        """
        from gen2embed_mteb.images.remote import require_allowed_names

        require_allowed_names(self.remote_images)


@dataclass(frozen=True, kw_only=True)
class OrientationOption:
    """Whether images are turned as their EXIF data says."""

    exif_orientation: bool = option(
        "turn images as their EXIF data says; the reference clients leave them as they are", default=False
    )

    def orientation(self) -> dict[str, bool]:
        """Return the option for a record of what decides vectors; nothing where it is off, as before it existed."""
        return {"exif_orientation": True} if self.exif_orientation else {}
