"""What scripts/demo shows: a conversation about two pictures, then small print with slicing and without."""

from __future__ import annotations

from pathlib import Path

import mmchat

PICTURES = Path(__file__).parent / "pictures"

CONVERSATION = [
    ("shapes.png", "What colour is the circle?"),
    ("garden.png", "Describe the image."),
    (None, "Where is the square in the first image?"),
]


def say(chat: mmchat.Session, picture: str | None, question: str) -> None:
    if picture:
        print(f"  + {picture}")
    print(f"  > {question}\n    ", end="")
    reply = chat.ask(question, images=[PICTURES / picture] if picture else [])
    for text in reply:
        print(text, end="", flush=True)
    use = reply.usage
    print(
        f"\n    [{use.n_reused} rows reused, {use.n_prefilled} prefilled, {use.n_new} new; "
        f"slices: {use.slices_encoded} encoded, {use.slices_cached} cached; {use.total_s:.2f} s]\n"
    )


def main() -> None:
    with mmchat.open("demo") as rt:
        print("One conversation. Each picture is encoded once, each row computed once:\n")
        chat = rt.session()
        for picture, question in CONVERSATION:
            say(chat, picture, question)
        print("Why slicing matters: the same small print, with at most 9 slices, then with none:\n")
        for n in (9, 1):
            print(f"  max_slice_nums={n}")
            say(rt.session(max_slice_nums=n), "sign.png", "What word is written?")


if __name__ == "__main__":
    main()
