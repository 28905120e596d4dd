"""Problems about money, speed, work and pay, ages and lengths."""

from __future__ import annotations

from scene import Rejected, Scene

ACTIVITIES = (
    ("{reads|read}", "pages", "day"), ("{runs|ran}", "km", "day"), ("{walks|walked}", "km", "hour"),
    ("{drives|drove}", "km", "hour"), ("{rides|rode}", "miles", "hour"), ("{earns|earned}", "<money>", "hour"),
    ("{earns|earned}", "<money>", "day"), ("{saves|saved}", "<money>", "week"), ("{makes|made}", "<objs>", "hour"),
    ("{eats|ate}", "<objs>", "day"), ("{sells|sold}", "<objs>", "day"), ("{bakes|baked}", "cakes", "day"),
    ("{types|typed}", "words", "minute"), ("{paints|painted}", "walls", "day"), ("{plants|planted}", "trees", "day"),
    ("{drives|drove}", "miles", "hour"), ("{travels|travelled}", "km", "hour"), ("{goes|went}", "miles", "hour"),
    ("{writes|wrote}", "pages", "day"), ("{drinks|drank}", "glasses of water", "day"), ("{swims|swam}", "laps", "day"),
)  # fmt: skip
MATERIALS = (
    ("rope", "metres", "cut off"), ("board", "cm", "cut off"), ("ribbon", "cm", "cut off"),
    ("wire", "metres", "cut off"), ("tank", "litres", "taken out"), ("barrel", "litres", "poured out"),
    ("road", "km", "finished"), ("book", "pages", "read"),
)  # fmt: skip


def shopping(scene: Scene) -> list[str]:
    """Buying one or two kinds of things; the cost or the change."""
    rng = scene.rng
    price, count = rng.randint(2, 30), scene.count()
    cost = scene.work(count, "*", price)
    one_kind = rng.random() < 0.55
    if one_kind:
        text = scene.price(
            "[[a|one|each] <obj> {costs|cost} <p> <money>. <A> {buys|bought} <k>[| <objs>| of them]."
            "|<A> {buys|bought} <k> <objs> [for|at] <p> <money> [each|apiece]."
            "|<A> {buys|bought} <k> <objs>. [Each|Each <obj>|One <obj>] {costs|cost} <p> <money>.]",
            p=price,
            k=count,
        )
    else:
        price2, count2 = rng.randint(2, 20), scene.count()
        text = scene.price(
            "[[a|one] <obj> {costs|cost} <p> <money> and [a|one] <obj2> {costs|cost} <q> <money>. "
            "<A> {buys|bought} <k> <objs> and <j> <objs2>."
            "|<A> {buys|bought} <k> <objs> [for|at] <p> <money> each and <j> <objs2> [for|at] <q> <money> each.]",
            p=price,
            q=price2,
            k=count,
            j=count2,
        )
        cost = scene.work(cost, "+", scene.work(count2, "*", price2))
    if rng.random() < 0.55:
        ask = (
            "How much [{does|did} <A> [pay|spend|have to pay]|{does|did} <he> [pay|spend]|{does|did} "
            "it cost|is that|{is|was} the total cost|money {does|did} <he> spend][| in total| "
            "altogether]?"
        )
        return [text, scene.sentence(ask), scene.worked(cost)]
    paid = (
        min(p for p in (10, 20, 50, 100, 200, 500, 999) if p >= cost)
        if rng.random() < 0.5
        else cost + rng.randint(1, 100)
    )
    change = scene.work(paid, "-", cost)
    if rng.random() < 0.5:
        text = scene.price("<A> {has|had} <p> <money>.", p=paid) + " " + text
        ask = "How [much money|much|many <money>] {does|did} <he> have left?"
    else:
        text += " " + scene.price("<A> {pays|paid} with <p> <money>.", p=paid)
        ask = "How much change {does|did} <he> [get|receive|get back]?"
    return [text, scene.price(ask), scene.worked(change)]


def purse(scene: Scene) -> list[str]:
    """Money earned and spent."""
    total = scene.amount(10, 300)
    text = [scene.price("<A> [{has|had}|{saves|saved}|{has|had} saved] <n> <money>.", n=total)]
    for _ in range(scene.rng.choice((1, 2, 2))):
        if scene.rng.random() < 0.55:
            spent = scene.part(total)
            total = scene.work(total, "-", spent)
            pattern = (
                "<he> {spends|spent} <n> <money>[| on <objs>| on a <obj>| at the <place>].|<he> {buys|"
                "bought} a <obj> for <n> <money>.|<he> {gives|gave} <n> <money> to <B>.|<he> {pays|paid} "
                "<n> <money> for [a <obj>|<objs>]."
            )
            text.append(scene.price(f"[{pattern}]", n=spent))
        else:
            gained = scene.amount()
            total = scene.work(total, "+", gained)
            pattern = (
                "<he> {earns|earned} <n> <money>[| more].|<he> {gets|got} <n> <money> from <his> <rel>.|"
                "<B> {gives|gave} <him> <n> <money>.|<he> {finds|found} <n> <money>.|<he> {sells|sold} a "
                "<obj> for <n> <money>."
            )
            text.append(scene.price(f"[{pattern}]", n=gained))
    ask = "How [much money|much|many <money>] {does|did} [<he>|<A>] have [left|now|in the end]?"
    return [*text, scene.price(ask), scene.worked(total)]


def rate(scene: Scene) -> list[str]:
    """So many per day, hour or minute."""
    rng = scene.rng
    speed, time = rng.choice((rng.randint(2, 30), rng.randint(2, 12), rng.randrange(10, 100, 10))), scene.count()
    act, unit, span = rng.choice(ACTIVITIES)
    who = rng.choice(("<A>", "<A>", "A machine", "A worker")) if unit in ("<objs>", "walls") else "<A>"
    if "drive" in act or "travel" in act or "go" in act:
        who = rng.choice(("<A>", "A car", "A train", "A truck", "The car", "A bus"))
    pace = f"<n> {unit} [per|a|every|each|in one] {span}"
    base = {"{reads|read}": "read", "{runs|ran}": "run", "{goes|went}": "go"}.get(
        act, act.strip("{").split("|")[0].removesuffix("s")
    )
    far = f"|How far {{does|did}} [<he>|it] {base} in <k> {span}s?" if unit in ("km", "miles") else ""
    draw = rng.random()
    if draw < 0.30:
        whole = speed * time
        text = scene.sentence(f"{who} {act} {pace}.", n=speed)
        ask = scene.price(
            f"How many {span}s [does <he> need|will it take|does it take] [to {base} <m> {unit}|for <m> {unit}]?",
            m=whole,
        )
        return [text, ask, scene.worked(scene.work(whole, "/", speed))]
    if draw < 0.40:
        whole = speed * time
        text = scene.sentence(
            f"{who} {act} <m> {unit} in <k> {span}s[|, the same number every {span}].", m=whole, k=time
        )
        return [
            text,
            scene.sentence(f"How many {unit} is that [per|in one|a|every|each] {span}?"),
            scene.worked(scene.work(whole, "/", time)),
        ]
    whole = scene.work(speed, "*", time)
    if draw < 0.75:
        text = scene.sentence(f"{who} {act} {pace}.", n=speed)
        ask = scene.sentence(
            f"[How many {unit} {{does|did}} <he> {base} in <k> {span}s?|How many {unit} is that in "
            f"<k> {span}s?|How many {unit} after <k> {span}s?{far}]",
            k=time,
        )
        return [text, ask, scene.worked(whole)]
    text = scene.sentence(
        f"{who} {act} {pace} for <k> {span}s[ and then| and|. Then <he>] {act} [another <m>|<m> more] {unit}.",
        n=speed,
        k=time,
        m=(more := scene.amount()),
    )
    ask = scene.sentence(f"How many {unit} [is that|{{does|did}} <he> {base}] [in total|altogether|in all]?")
    return [text, ask, scene.worked(scene.work(whole, "+", more))]


def shifts(scene: Scene) -> list[str]:
    """The same pace on two days, or two paces."""
    rng = scene.rng
    pay, first, second = rng.randint(3, 25), rng.randint(2, 10), rng.randint(2, 10)
    if rng.random() < 0.5:
        hours = scene.work(first, "+", second)
        text = scene.price(
            "<A> {earns|earned} <p> <money> [an hour|per hour]. <A> {works|worked} <n> hours on "
            "<day> and <m> hours on <day2>.",
            p=pay,
            n=first,
            m=second,
        )
        ask = "How [much|much money|many <money>] {does|did} <he> earn[| in total| altogether]?"
        return [text, scene.price(ask), scene.worked(scene.work(hours, "*", pay))]
    other = rng.randint(2, 25)
    one, two = scene.work(first, "*", pay), scene.work(second, "*", other)
    text = scene.sentence(
        "<A> {makes|made} <p> <objs> [a day|every day|per day] for <n> days and <q> <objs> [a "
        "day|every day|per day] for <m> days.",
        p=pay,
        n=first,
        q=other,
        m=second,
    )
    ask = "How many <objs> {does|did} <he> make [in total|altogether|in all]?"
    return [text, scene.sentence(ask), scene.worked(scene.work(one, "+", two))]


def ages(scene: Scene) -> list[str]:
    """Ages now, later, earlier and compared."""
    rng = scene.rng
    age, gap = rng.randint(5, 60), rng.randint(1, 15)
    kind = rng.choice(("older", "younger", "later", "ago", "times", "sum"))
    text = scene.sentence("<A> is <n> years old.", n=age)
    if kind in ("older", "younger"):
        answer = scene.work(age, "+" if kind == "older" else "-", gap)
        text += " " + scene.sentence(f"[<B> is|<his> <rel> <B> is] <n> years {kind}[| than <A>].", n=gap)
        ask = "How old is <B>?"
    elif kind == "times":
        answer = scene.work(age, "*", times := rng.randint(2, 5))
        text += " " + scene.sentence("<B> is <n> times as old[| as <A>].", n=times)
        ask = "How old is <B>?"
    elif kind == "sum":
        other = rng.randint(5, 60)
        answer = (
            scene.work(scene.work(age, "+", other), "+", third)
            if (third := rng.choice((0, rng.randint(5, 60))))
            else scene.work(age, "+", other)
        )
        text += (
            " "
            + scene.sentence("<B> is <n>[| years old].", n=other)
            + (" " + scene.sentence("<C> is <n>[| years old].", n=third) if third else "")
        )
        ask = "[How old are they together?|What is the sum of their ages?|How old are they in total?]"
    else:
        answer = scene.work(age, "+" if kind == "later" else "-", gap)
        ask = "How old will <A> be in <n> years?" if kind == "later" else "How old was <A> <n> years ago?"
    return [text, scene.sentence(ask, n=gap), scene.worked(answer)]


def lengths(scene: Scene) -> list[str]:
    """Pieces cut from a rope, litres taken from a tank."""
    rng = scene.rng
    thing, unit, act = rng.choice(MATERIALS)
    total = scene.amount(10, 300)
    verb = "has" if unit in ("litres", "pages") else "is"
    tail = " long" if verb == "is" else ""
    text = scene.sentence(f"A {thing} {verb} <n> {unit}{tail}.", n=total)
    if rng.random() < 0.3:
        pieces = scene.divisor(total)
        text += " " + scene.sentence("[it is|<A> has it] divided into <k> equal parts.", k=pieces)
        return [
            text,
            scene.sentence(f"How many {unit} [does each part have|is each part|are in each part]?"),
            scene.worked(scene.work(total, "/", pieces)),
        ]
    if rng.random() < 0.5:
        gone = scene.part(total)
        text += " " + scene.sentence(f"<n> {unit} are {act}.", n=gone)
    else:
        count, size = scene.count(), rng.randint(2, 20)
        if count * size >= total:
            raise Rejected
        text += " " + scene.sentence(f"<k> [pieces|parts|portions] of <n> {unit} [each |]are {act}.", k=count, n=size)
        gone = scene.work(count, "*", size)
    return [
        text,
        scene.sentence(f"How many {unit} [are left|remain|of the {thing} are left]?"),
        scene.worked(scene.work(total, "-", gone)),
    ]
