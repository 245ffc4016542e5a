# SPDX-License-Identifier: Apache-2.0
"""Objects and places in words, English and Chinese, for captions."""

from data_pipelines.synthesis.objects import Object
from data_pipelines.synthesis.scenery import Scenery

_THINGS = {
  "sign": ("sign on posts", "立着的标牌"),
  "shop": ("shop sign", "店铺招牌"),
  "poster": ("taped-up notice", "用胶带贴着的告示"),
  "banner": ("cloth banner between two poles", "两杆之间的布横幅"),
  "chalkboard": ("chalkboard on legs", "立式粉笔板"),
  "plate": ("plate", "牌子"),
  "book": ("hardcover book", "精装书"),
  "mug": ("mug of coffee", "盛着咖啡的马克杯"),
  "box": ("cardboard packaging box", "包装盒"),
  "screen": ("page on a computer screen", "电脑屏幕页面"),
  "notebook": ("spiral notebook", "线圈笔记本"),
  "card": ("printed card", "印刷卡片"),
}
_GROUNDS = {
  "planks": ("wooden planks", "木板"),
  "marble": ("a marble top", "大理石台面"),
  "cloth": ("a tablecloth", "桌布"),
  "plaster": ("a smooth table", "光滑的桌面"),
  "grass": ("grass", "草地"),
  "asphalt": ("asphalt", "柏油路面"),
  "tiles": ("paving tiles", "地砖"),
  "concrete": ("concrete", "水泥地面"),
}
_WALLS = {
  "brick": ("a brick wall", "砖墙"),
  "plaster": ("a plastered wall", "抹灰墙"),
  "concrete": ("a concrete wall", "水泥墙"),
  "tiles": ("a tiled wall", "瓷砖墙"),
}


def described(thing: Object, scenery: Scenery) -> tuple[str, str]:
  """An object and where it is, in English and in Chinese."""
  kind, kind_zh = _THINGS[thing.name]
  colour, colour_zh = thing.colours.name
  ground, ground_zh = _GROUNDS.get(scenery.ground, ("", ""))
  wall, wall_zh = _WALLS.get(scenery.wall, ("", ""))
  place, place_zh = {
    "desk": (f"lying on {ground}", f"放在{ground_zh}上的"),
    "room": (f"on {ground} in front of {wall}", f"{wall_zh}前{ground_zh}上的"),
    "street": (
      f"on {ground} in front of {wall}",
      f"{wall_zh}前{ground_zh}上的",
    ),
    "field": ("on a meadow under the sky", "天空下草地上的"),
    "wall": (f"on {wall}", f"{wall_zh}上的"),
    "photo": ("in a photo", "照片中的"),
  }[scenery.setting]
  return f"A {colour} {kind} {place}", f"{place_zh}{colour_zh}{kind_zh}"
