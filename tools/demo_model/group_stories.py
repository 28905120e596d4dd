"""Problems about equal groups."""

from __future__ import annotations

from scene import Scene


def _shared(scene: Scene, whole: int, count: int) -> list[str]:
    """A known number of groups: how many in each."""
    text = scene.sentence(
        "[<A> {has|had} <m> <objs>[ and|. <He>] {puts|put} them [equally |evenly |]into <n> <boxes>"
        "|<m> <objs> {are|were} [shared|divided|split] equally [among|between] <n> [children|"
        "friends|people|<boxes>]"
        "|<A> {shares|shared} <m> <objs> equally [among|between|with] <n> [friends|children|people]].",
        m=whole,
        n=count,
    )
    ask = (
        "How many <objs> {does|did} each [one |]get?"
        if "into" not in text
        else "How many <objs> {are|were} in each[| <box>]?"
    )
    return [text, scene.sentence(ask), scene.worked(scene.work(whole, "/", count))]


def _filled(scene: Scene, whole: int, size: int) -> list[str]:
    """A known group size: how many groups."""
    text = scene.sentence(
        "[<A> {has|had} <m> <objs>|There {are|were} <m> <objs>]. [Each|One|Every] <box> {holds|"
        "held} <n>[| <objs>| of them].",
        m=whole,
        n=size,
    )
    ask = "How many <boxes> [{are|were} needed|{does|did} <A> need|can <A> fill|can be filled]?"
    return [text, scene.sentence(ask), scene.worked(scene.work(whole, "/", size))]


def _told(scene: Scene, count: int, size: int) -> str:
    """The sentence that tells of equal groups."""
    return scene.sentence(
        "[There {are|were} <k> [<boxes>|rows|boxes|tables|groups|teams] [with|of] <n> <objs>[ each| in each|]"
        "|<A> {has|had} <k> <boxes> [with|of] <n> <objs> [each|in each]"
        "|<A> {buys|bought} <k> <boxes> of <objs>. Each <box> {has|had} <n>[| <objs>| in it]"
        "|Each <box> {has|had} <n> <objs>. <A> {has|had} <k> <boxes>"
        "|<k> [children|friends|people] {have|had} <n> <objs> each"
        "|A <place> {has|had} <k> shelves with <n> <objs> [each|on each]].",
        k=count,
        n=size,
    )


def _total(scene: Scene, text: str, whole: int) -> list[str]:
    owned = "|{does|did} <A> have" if scene.slots["A"] in text else ""
    ask = (
        f"How many <objs> [{{are|were}} there|is that|{{does|did}} that make{owned}|{{are|were}} "
        f"there in all] [in total|altogether|in all]?"
    )
    return [text, scene.sentence(ask), scene.worked(whole)]


def _some_gone(scene: Scene, text: str, whole: int) -> list[str]:
    gone = scene.part(whole)
    text += " " + scene.sentence(
        "<n> [<objs> |of them |]{are|were} [broken|sold|eaten|lost|taken|missing|bad|given away].", n=gone
    )
    ask = (
        "How many [<objs> |][{are|were} left|{remain|remained}|{are|were} still there|{are|were} "
        "not [broken|lost|sold]]?"
    )
    return [text, scene.sentence(ask), scene.worked(scene.work(whole, "-", gone))]


def _some_extra(scene: Scene, text: str, whole: int) -> list[str]:
    extra = scene.amount()
    text += " " + scene.sentence(
        "[there {are|were} also|there {are|were}|<A> also {has|had}] <n> [more|other|loose|extra] <objs>.", n=extra
    )
    return [
        text,
        scene.sentence("How many <objs> [{are|were} there|is that] [in total|altogether|in all]?"),
        scene.worked(scene.work(whole, "+", extra)),
    ]


def groups(scene: Scene) -> list[str]:
    """Equal groups: the whole, the rest, or how many per group."""
    count, size = scene.count(), scene.size()
    draw = scene.rng.random()
    if draw < 0.35:
        if scene.rng.random() < 0.5:
            return _shared(scene, count * size, count)
        return _filled(scene, count * size, size)
    whole = scene.work(count, "*", size)
    text = _told(scene, count, size)
    kind = _total if draw < 0.65 else _some_gone if draw < 0.88 else _some_extra
    return kind(scene, text, whole)
