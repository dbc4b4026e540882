"""A picture of how a picture is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.slicing import SlicePlan

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_SIDE_PX, _MIN_SIDE_PX = 1600, 640
_LINE, _PLATE, _INK = (255, 64, 0), (0, 0, 0, 168), (255, 255, 255)


def draw_cut(image: Image, plan: SlicePlan, query_num: int) -> Image:
    """The picture, scaled to a handy size, with the grid's lines, each cell's number, size and rows, and a summary."""
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    longest = max(image.size)
    scale = min(max(1.0, _MIN_SIDE_PX / longest), _MAX_SIDE_PX / longest)
    width, height = (max(1, round(side * scale)) for side in image.size)
    font = ImageFont.load_default(15)
    columns, rows = plan.grid or (1, 1)
    cell = plan.cell or plan.source
    head = [f"{plan.size[0]}x{plan.size[1]} px, {plan.n_inputs} views, {plan.n_inputs * query_num} rows"]
    head.append(f"view 0: the whole picture at {plan.source[0]}x{plan.source[1]}, {query_num} rows")
    if plan.shrunk:
        head.append("shrunk to what the encoder takes")
    line_px = 22
    canvas = pil.new("RGB", (max(width, 420), height + line_px * len(head) + 8), (24, 24, 24))
    top = canvas.height - height
    canvas.paste(image.convert("RGB").resize((width, height)), (0, top))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for i, text in enumerate(head):
        draw.text((8, 5 + i * line_px), text, font=font, fill=_INK)
    if plan.grid is None:
        return canvas
    for i in range(columns + 1):
        x = min(round(i * width / columns), width - 1)
        draw.line((x, top, x, top + height), fill=_LINE, width=2)
    for j in range(rows + 1):
        y = top + min(round(j * height / rows), height - 1)
        draw.line((0, y, width, y), fill=_LINE, width=2)
    for j in range(rows):
        for i in range(columns):
            x, y = round(i * width / columns) + 6, top + round(j * height / rows) + 6
            text = f"{1 + j * columns + i}: {cell[0]}x{cell[1]}, {query_num} rows"
            if draw.textlength(text, font) > width / columns - 16:
                text = str(1 + j * columns + i)
            box = draw.textbbox((x + 4, y + 2), text, font=font)
            draw.rectangle((x, y, box[2] + 4, box[3] + 4), fill=_PLATE)
            draw.text((x + 4, y + 2), text, font=font, fill=_INK)
    return canvas
