"""Image sets on disk: one colour for each image, so that an image can be told from its pixels."""

import io
import tarfile

from PIL import Image


def png(number, side=12):
    """An image whose red is its number; lossless."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folders(root, counts, *, first=0):
    """root/class/000.png ...; numbers run through all classes."""
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(first, first + count):
            (folder / f"{number:03}.png").write_bytes(png(number))
        first += count


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def reds(batch, data):
    """The numbers of the images in a normalised batch of one-coloured images."""
    return (batch.x[:, 0].mean(dim=(1, 2)) * data.std[0] + data.mean[0]).round().long().tolist()
