"""Problems about comparing people, handing things over, totals and missing amounts."""

from __future__ import annotations

from scene import Rejected, Scene

MORE = "[more|more|more <objs>]"
TOGETHER = (
    "How many <objs> do they have [together|in total|altogether|in all]?",
    "How many <objs> do <A> and <B> have [together|in total|altogether|in all]?",
    "How many do they have [together|in total|altogether]?",
    "What is the total number of <objs>?",
)


def _relation(scene: Scene, base: int, who: str, other: str) -> tuple[str, int]:
    """How many things `who` has, told relative to `other`."""
    kind = scene.rng.choice("++--*2/")
    end = f"than <{other}>"
    if kind == "+":
        amount = scene.amount(1, 120)
        return scene.sentence(f"<{who}> {{has|had}} <n> [{MORE}|more <objs>] {end}.", n=amount), scene.work(
            base, "+", amount
        )
    if kind == "-":
        amount = scene.part(base)
        return scene.sentence(f"<{who}> {{has|had}} <n> [fewer|less|fewer <objs>] {end}.", n=amount), scene.work(
            base, "-", amount
        )
    if kind == "2":
        return scene.sentence(
            f"<{who}> {{has|had}} [twice|double|two times] as many[| <objs>] as <{other}>."
        ), scene.work(base, "*", 2)
    if kind == "*":
        times = scene.rng.randint(3, 9)
        return scene.sentence(f"<{who}> {{has|had}} <n> times as many[| <objs>] as <{other}>.", n=times), scene.work(
            base, "*", times
        )
    if base % 2 or base < 4:
        raise Rejected
    return scene.sentence(f"<{who}> {{has|had}} half as many[| <objs>] as <{other}>."), scene.work(base, "/", 2)


def comparison(scene: Scene) -> list[str]:
    """Two or three people, each told relative to the one before."""
    first = scene.amount(2, 150)
    sentences = [scene.sentence("<A> {has|had} <n> <objs>.", n=first)]
    text, second = _relation(scene, first, "B", "A")
    if scene.rng.random() < 0.15:
        sentences.insert(0, text)
    else:
        sentences.append(text)
    draw = scene.rng.random()
    if draw < 0.40:
        ask = (
            "[How many <objs> {does|did} <B> have?|How many {does|did} <B> have?|What is the number "
            "of <objs> <B> {has|had}?]"
        )
        return [*sentences, scene.sentence(ask), scene.worked(second)]
    if draw < 0.72:
        total = scene.work(first, "+", second)
        return [*sentences, scene.sentence(scene.rng.choice(TOGETHER)), scene.worked(total)]
    text, third = _relation(scene, second, "C", "B")
    sentences.append(text)
    if draw < 0.86:
        return [*sentences, scene.sentence("How many <objs> {does|did} <C> have?"), scene.worked(third)]
    total = scene.work(scene.work(first, "+", second), "+", third)
    ask = "How many <objs> do [they|the three of them|<A>, <B> and <C>] have [together|in total|altogether|in all]?"
    return [*sentences, scene.sentence(ask), scene.worked(total)]


def transfer(scene: Scene) -> list[str]:
    """One person hands something to the other; either side is asked for."""
    giver, taker = scene.amount(4), scene.amount()
    moved = scene.part(giver)
    first, second = scene.rng.sample("AB", 2)
    text = scene.sentence(
        f"<{first}> {{has|had}} <n> <objs>[. | and |, ]<{second}> {{has|had}} <m>[| <objs>].", n=giver, m=taker
    )
    text += " " + scene.sentence(
        f"[<{first}> {{gives|gave}} [<k>[| <objs>| of them] to <{second}>|<{second}> <k>[| <objs>| of them]]"
        f"|<{second}> {{gets|got}} <k>[| <objs>| of them] from <{first}>].",
        k=moved,
    )
    if scene.rng.random() < 0.5:
        who, answer = first, scene.work(giver, "-", moved)
    else:
        who, answer = second, scene.work(taker, "+", moved)
    return [
        text,
        scene.sentence(f"How many [<objs> |]{{does|did}} <{who}> have[ now| then| in the end|]?"),
        scene.worked(answer),
    ]


def difference(scene: Scene) -> list[str]:
    """Who has more, and by how much."""
    low = scene.amount()
    high = low + scene.amount(1, 150)
    gap = scene.work(high, "-", low)
    big, small = ("A", "B") if scene.rng.random() < 0.5 else ("B", "A")
    numbers = {big: high, small: low}
    text = scene.sentence(
        "<A> {has|had} <n> <objs>[. | and |, ]<B> {has|had} <m>[| <objs>].", n=numbers["A"], m=numbers["B"]
    )
    if scene.rng.random() < 0.65:
        ask = f"How many more <objs> {{does|did}} <{big}> have than <{small}>?"
    else:
        ask = f"How many fewer <objs> {{does|did}} <{small}> have than <{big}>?"
    return [text, scene.sentence(ask), scene.worked(gap)]


def totals(scene: Scene) -> list[str]:
    """Several amounts added up."""
    numbers = [scene.amount() for _ in range(scene.rng.choice((2, 3, 3, 4)))]
    total = numbers[0]
    for amount in numbers[1:]:
        total = scene.work(total, "+", amount)
    shown = dict(zip("nmkj", numbers, strict=False))
    kind = (
        scene.rng.choice(("things", "people", "days"))
        if len(numbers) == 3
        else "things"
        if len(numbers) == 4
        else "pair"
    )
    if kind == "things":
        items = ["<n> <objs>", "<m> <objs2>", "<k> <objs3>", "<j> [coins|toys|sweets|flowers]"][: len(numbers)]
        listed = ", ".join(items[:-1]) + " and " + items[-1]
        text = scene.sentence(
            f"[<A> {{has|had}} {listed}|There {{are|were}} {listed} in [a <box>|the <place>]|<A> "
            f"{{buys|bought}} {listed}].",
            **shown,
        )
        ask = (
            "How many [things|items|objects] [{are|were} there|is that|does that make|{does|did} "
            "<he> have] [in total|altogether|in all|together]?"
        )
    elif kind == "people":
        text = scene.sentence(
            "<A> {has|had} <n> <objs>, <B> {has|had} <m>[| <objs>] and <C> {has|had} <k>[| <objs>].", **shown
        )
        ask = "How many <objs> do they have [together|in total|altogether|in all]?"
    elif kind == "days":
        verb = "[{sells|sold}|{makes|made}|{collects|collected}|{counts|counted}|{reads|read}|{buys|bought}]"
        text = scene.sentence(
            f"<A> {verb} <n> <objs> on <day>, <m> on <day2> and <k> on the [next|third|last] day.", **shown
        )
        ask = "How many <objs> [is that|{are|were} there|did <he> count] [in total|altogether|in all]?"
    else:
        text = scene.sentence(
            "[<A> {has|had} <n> <objs>[. | and ]<B> {has|had} <m>[| <objs>]"
            "|There {are|were} <n> <color> <objs> and <m> <color2> <objs>[| in the <box>]"
            "|<A> {has|had} <n> <color> <objs> and <m> <color2> <objs>"
            "|<A> {buys|bought} <n> <objs> on <day> and <m> on <day2>].",
            **shown,
        )
        ask = (
            "[How many <objs> [{are|were} there|is that|do they have|are there] [in total|altogether|"
            "in all|together]?|What is the total?|How many <objs> [in total|altogether]?]"
        )
    return [text, scene.sentence(ask), scene.worked(total)]


def unknown(scene: Scene) -> list[str]:
    """The start or the change is what is asked for."""
    small, change = scene.amount(), scene.amount()
    large = small + change
    result = scene.work(large, "-", change)
    if scene.rng.random() < 0.5:
        text = scene.sentence(
            "<A> {has|had} some <objs>. <He> [{gets|got}|{buys|bought}|{finds|found}] <n> more[ and "
            "now has| and then had|. Now <he> has|. Now there are] <m>[| <objs>].",
            n=change,
            m=large,
        )
        ask = "How many <objs> did <A> have [at first|at the start|before|in the beginning|to start with]?"
    else:
        text = scene.sentence(
            "[<A> had <m> <objs>. After [eating|selling|losing|giving away|using] some[| of them], "
            "<he> [has|had] <n> left"
            "|<A> had <m> <objs>. Now <he> has [only |]<n>[| left]"
            "|<A> had <m> <objs> and [gave some to <B>|lost some|sold some of them|used some]. Now "
            "<he> has <n>[| left]].",
            n=change,
            m=large,
        )
        ask = (
            "How many [<objs> |]did <A> [lose|give away|use|sell|no longer have]?"
            if "some" not in text
            else "How many [<objs> |][were that|did <he> [give away|lose|use|sell|eat]]?"
        )
    return [text, scene.sentence(ask), scene.worked(result)]


def goal(scene: Scene) -> list[str]:
    """How many are still missing."""
    have = scene.amount()
    missing = scene.amount(1, 150)
    answer = scene.work(have + missing, "-", have)
    text = (
        "[<A> {wants|wanted} [to collect |to have |to buy |]<m> <objs>. <A> [already |]{has|had} "
        "<n>|<A> {needs|needed} <m> <objs>[.| but] <he> [only |already |]{has|had} <n>|<A> {has|"
        "had} <n> <objs> and {needs|needed} <m>]."
    )
    text = scene.say(text, n=have, m=have + missing)
    head, mark, tail = text.partition(". ")
    text = head + mark + tail[:1].upper() + tail[1:]
    ask = "How many more [<objs> |]{does|did} <he> need?"
    return [text[:1].upper() + text[1:], scene.sentence(ask), scene.worked(answer)]
