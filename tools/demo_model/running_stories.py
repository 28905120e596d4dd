"""Problems that follow one amount through several events."""

from __future__ import annotations

from collections.abc import Callable

from scene import Rejected, Scene

GAIN = (
    "{buys|bought} <n> more",
    "{buys|bought} <n> [more <objs>|<objs>|more <objs> at the <place>]",
    "{gets|got} <n> more[| <objs>] from [<B>|<his> <rel>|a friend]",
    "{finds|found} <n> [more|more <objs>|<objs>|<objs> in the garden]",
    "{receives|received} <n> [more |][<objs> ]from <B>",
    "{wins|won} <n> [more|more <objs>|<objs>|<objs> in a game]",
    "{picks|picked} [up |]<n> [more|more <objs>|<objs>]",
    "{collects|collected} [another |]<n> <objs>",
    "{is|was} given <n> [more|more <objs>|<objs>]",
    "{adds|added} <n> [more|more <objs>|<objs>]",
    "{makes|made} <n> [more|more <objs>]",
    "{gets|got} [another <n>|<n> <objs> as a gift|<n> new <objs>]",
)
LOSS = (
    "{gives|gave} <n> [<objs> |][to <B>|to <his> <rel>|away]",
    "{gives|gave} [<B>|<his> <rel>|a friend] <n>[| <objs>| of them]",
    "{loses|lost} <n>[| <objs>| of them]",
    "{sells|sold} <n>[| <objs>| of them| <objs> to <B>]",
    "{eats|ate} <n>[| <objs>| of them]",
    "{uses|used} <n>[| <objs>| of them]",
    "{breaks|broke} <n>[| <objs>| of them]",
    "{throws|threw} away <n>[| <objs>| of them]",
    "{donates|donated} <n>[| <objs>| of them]",
    "{drops|dropped} <n>[| <objs>| of them]",
    "{takes|took} <n> [<objs> |]to [school|the <place>|<B>]",
    "{lends|lent} <n>[| <objs>] to <B>",
)
GAIN_GROUPS = (
    "{buys|bought} <k> <boxes> with <n> <objs> [each|in each|in each <box>|per <box>]",
    "{buys|bought} <k> [more |]<boxes> of <n>[| <objs>][| each]",
    "{gets|got} <k> <boxes> [with|of] <n> <objs> each[| from <B>]",
    "{finds|found} <k> <boxes> with <n> <objs> in each",
    "{buys|bought} <k> <boxes>. Each <box> [{has|had}|{contains|contained}|{holds|held}] <n> <objs>",
    "{gets|got} <n> <objs> from each of <his> <k> [friends|cousins|neighbours]",
    "{collects|collected} <n> <objs> [a day|every day|per day] for <k> days",
    "{receives|received} <n> more <objs> from each of <k> friends",
)
LOSS_GROUPS = (
    "{gives|gave} <n> <objs> to each of <k> [friends|children|people|cousins]",
    "{gives|gave} <n> [<objs> |]to each of <his> <k> [friends|classmates|neighbours|cousins]",
    "{gives|gave} <k> [friends|children] <n> <objs> each",
    "{gives|gave} <k> [friends|children|people] <n> each",
    "{sells|sold} <k> <boxes> [with|of] <n> <objs> [each|in each]",
    "{fills|filled} <k> <boxes> with <n> <objs> each and {sells|sold} them",
    "{eats|ate} <n> [<objs> |][a day|every day|each day] for <k> days",
    "{uses|used} <n> <objs> [a day|every day|each day] for <k> days",
)
DOUBLE = ("{doubles|doubled} [this number|<his> collection|the number of <objs>|them]",)
HALF = (
    "{gives|gave} [away half of them|half of them to <B>|half of <his> <objs> to <B>|half away]",
    "{sells|sold} half of [them|the <objs>|<his> <objs>]",
    "{loses|lost} half of [them|<his> <objs>]",
    "{eats|ate} half of them",
)
START = (
    "<A> {has|had} <n> <objs>.",
    "<A> {has|had} <n> <objs>.",
    "<A> {owns|owned} <n> <objs>.",
    "<A> [{starts|started} with|{collects|collected}|{buys|bought}|{picks|picked}] <n> <objs>.",
    "There {are|were} <n> <objs> in <A>'s <box>.",
    "<A> {has|had} a <box> with <n> <objs>[| in it].",
)
ASK = (
    "How many <objs> {does|did} <A> have [now|left|now|in the end|in total]?",
    "How many <objs> {does|did} <he> have [now|left|in the end|at the end|]?",
    "How many <objs> {does|did} <A> have?",
    "How many {are|were} left?",
    "How many <objs> [{are|were} left|{remain|remained}|does <A> still have|{are|were} there now]?",
    "How many {does|did} <A> have [now|left|in the end|then]?",
    "What is the number of <objs> <A> {has|had} [now|left|in the end]?",
    "[Find|Tell me|Calculate|Work out] how many <objs> <A> {has|had} [now|left|in the end].",
    "How many <objs> {has|had} <A> now?",
)  # fmt: skip


def _gain(scene: Scene, total: int) -> tuple[str, int]:
    amount = scene.amount()
    return scene.say(scene.rng.choice(GAIN), n=amount), scene.work(total, "+", amount)


def _loss(scene: Scene, total: int) -> tuple[str, int]:
    amount = scene.part(total)
    return scene.say(scene.rng.choice(LOSS), n=amount), scene.work(total, "-", amount)


def _gain_groups(scene: Scene, total: int) -> tuple[str, int]:
    groups, size = scene.count(), scene.size()
    phrase = scene.say(scene.rng.choice(GAIN_GROUPS), k=groups, n=size)
    return phrase, scene.work(total, "+", scene.work(groups, "*", size))


def _loss_groups(scene: Scene, total: int) -> tuple[str, int]:
    groups = scene.count()
    if total // groups < 2:
        raise Rejected
    size = scene.rng.randint(1, min(12, total // groups))
    phrase = scene.say(scene.rng.choice(LOSS_GROUPS), k=groups, n=size)
    return phrase, scene.work(total, "-", scene.work(groups, "*", size))


def _double(scene: Scene, total: int) -> tuple[str, int]:
    return scene.say(scene.rng.choice(DOUBLE)), scene.work(total, "*", 2)


def _half(scene: Scene, total: int) -> tuple[str, int]:
    if total % 2 or total < 4:
        raise Rejected
    return scene.say(scene.rng.choice(HALF)), scene.work(total, "/", 2)


Event = Callable[[Scene, int], tuple[str, int]]
EVENTS: tuple[Event, ...] = (_gain, _loss, _gain_groups, _loss_groups, _double, _half)
EVENT_WEIGHTS = (30, 34, 22, 18, 3, 6)


def _subject(scene: Scene) -> str:
    return scene.say("[<he>|<he>|<he>|then <he>|<A>|then <A>|after that, <he>|later, <he>|next, <he>|on <day> <he>]")


def _join(scene: Scene, phrases: list[str]) -> list[str]:
    """Sentences that tell the events in order, some of them two in one sentence."""
    sentences: list[str] = []
    pending = list(phrases)
    while pending:
        text = f"{_subject(scene)} {pending.pop(0)}"
        while pending and scene.rng.random() < 0.35:
            text += scene.rng.choice([" and ", " and then ", ", then ", " and ", f", and {scene.slots['he']} "])
            text += pending.pop(0)
        sentences.append(text[:1].upper() + text[1:] + ".")
    return sentences


def _final(scene: Scene, total: int) -> tuple[str, int]:
    """The question: what is left, or what each gets, or what it sells for."""
    draw = scene.rng.random()
    if draw < 0.80:
        return scene.sentence(scene.rng.choice(ASK)), total
    if draw < 0.88:
        people = scene.divisor(total)
        ask = (
            "<he> {shares|shared} [them|the <objs>|the rest] equally [among|between|with] <k> friends. "
            "How many <objs> {does|did} each [friend |]get?"
        )
        return scene.sentence(ask, k=people), scene.work(total, "/", people)
    if draw < 0.94:
        size = scene.divisor(total)
        ask = (
            "<he> {puts|put} [them|the <objs>|all of them] into <boxes> [of <n>|with <n> <objs> each]. "
            "How many <boxes> {does|did} [<he>|<A>] [need|fill|use|have]?"
        )
        return scene.sentence(ask, n=size), scene.work(total, "/", size)
    price = scene.rng.randint(2, 9)
    ask = (
        "<he> {sells|sold} [the rest|them|all of them] for <n> <money> each. "
        "How [much money|many <money>] {does|did} <he> [get|make|earn]?"
    )
    return scene.price(ask, n=price), scene.work(total, "*", price)


def running(scene: Scene) -> list[str]:
    """One person's things after one to three events."""
    total = scene.amount(3)
    sentences = [scene.sentence(scene.rng.choice(START), n=total)]
    phrases = []
    for _ in range(scene.rng.choices((1, 2, 3), (35, 45, 20))[0]):
        event = scene.rng.choices(EVENTS, EVENT_WEIGHTS)[0]
        phrase, total = event(scene, total)
        phrases.append(phrase)
    sentences += _join(scene, phrases)
    question, answer = _final(scene, total)
    return [*sentences, question, scene.worked(answer)]


def conditional(scene: Scene) -> list[str]:
    """The same in one sentence: "If Tom has 12 apples and buys 9 more, how many ...?"."""
    total = start = scene.amount(3)
    phrases = []
    for _ in range(scene.rng.choices((1, 2), (65, 35))[0]):
        event = scene.rng.choice((_gain, _loss))
        phrase, total = event(scene, total)
        phrases.append(phrase)
    story = scene.say("<A> {has|had} <n> <objs>", n=start)
    ask = scene.say("how many [<objs> |]{does|did} <he> have[| now| left| in the end]")
    if scene.rng.random() < 0.5 or len(phrases) > 1:
        text = f"If {story}" + "".join(scene.rng.choice([" and ", ", ", " and then "]) + p for p in phrases)
        return [f"{text}, {ask}?", scene.worked(total)]
    ask = scene.sentence("how many <objs> {does|did} <A> have[| now| left] if <he>")
    return [f"{ask} {story.split(' ', 1)[1]} and {phrases[0]}?", scene.worked(total)]


def stock(scene: Scene) -> list[str]:
    """Things in a place, with deliveries and sales told in the passive."""
    total = scene.amount(5)
    start = (
        "[There {are|were} <n> <objs> [in|at] [the|a] <place>|A <place> {has|had} <n> <objs>|The "
        "<place> {has|had} <n> <objs>]."
    )
    sentences = [scene.sentence(start, n=total)]
    for _ in range(scene.rng.choice((1, 2, 2, 3))):
        kind = scene.rng.choice("+-*")
        if kind == "+":
            amount = scene.amount()
            pattern = (
                "[then |]<n> [more |more <objs> |new <objs> ][{are|were} [added|delivered|brought]|"
                "{arrive|arrived}|{come|came}][| on <day>]."
            )
            total = scene.work(total, "+", amount)
            sentences.append(scene.sentence(pattern, n=amount))
        elif kind == "-":
            amount = scene.part(total)
            pattern = (
                "[then |]<n> [of them |<objs> |]{are|were} [sold|taken away|broken|removed|lost|bought "
                "by <A>|thrown away|given away][| on <day>]."
            )
            total = scene.work(total, "-", amount)
            sentences.append(scene.sentence(pattern, n=amount))
        else:
            groups, size = scene.count(), scene.size()
            pattern = (
                "[then |][<k> <boxes> [of|with] <n> <objs>[| each] {arrive|arrived}|a truck {brings|"
                "brought} <k> <boxes> with <n> <objs> each]."
            )
            total = scene.work(total, "+", scene.work(groups, "*", size))
            sentences.append(scene.sentence(pattern, k=groups, n=size))
    ask = (
        "How many <objs> {are|were} [left|there now|in the <place> now|there in the end|there]?|"
        "How many <objs> {does|did} the <place> have [now|left]?|How many {are|were} left?"
    )
    return [*sentences, scene.sentence(f"[{ask}]"), scene.worked(total)]


def journey(scene: Scene) -> list[str]:
    """People getting on and off."""
    total = scene.rng.randint(5, 80)
    vehicle = scene.rng.choice(("bus", "train", "tram", "boat", "ferry"))
    people = scene.rng.choice(("people", "passengers", "children"))
    sentences = [
        scene.sentence(
            f"[There {{are|were}} <n> {people} on [a|the] {vehicle}|A {vehicle} {{has|had}} <n> {people}[| on it]].",
            n=total,
        )
    ]
    stops = iter(("first", "second", "third"))
    for _ in range(scene.rng.choice((1, 1, 2))):
        off, on = scene.part(total), scene.rng.randint(1, 30)
        where = scene.rng.choice([f"At the {next(stops)} [stop|station]", "At the next [stop|station]", "Then"])
        kind = scene.rng.random()
        if kind < 0.25:
            total = scene.work(total, "-", off)
            sentences.append(scene.sentence(where + "[,|] <n> [of them |more |people |]{get|got} off.", n=off))
        elif kind < 0.5:
            total = scene.work(total, "+", on)
            sentences.append(scene.sentence(where + "[,|] <n> [more |people |more people |]{get|got} on.", n=on))
        elif kind < 0.8:
            total = scene.work(scene.work(total, "-", off), "+", on)
            sentences.append(
                scene.sentence(where + "[,|] <n> [people |]{get|got} off and <m> [people |]{get|got} on.", n=off, m=on)
            )
        else:
            total = scene.work(scene.work(total, "+", on), "-", off)
            sentences.append(
                scene.sentence(where + "[,|] <n> [people |]{get|got} on and <m> [people |]{get|got} off.", n=on, m=off)
            )
    ask = (
        f"How many {people} {{are|were}} [on the {vehicle} now|now on the {vehicle}|left on the "
        f"{vehicle}|on the {vehicle}]?"
    )
    return [*sentences, scene.sentence(ask), scene.worked(total)]
