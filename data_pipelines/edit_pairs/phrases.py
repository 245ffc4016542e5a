# SPDX-License-Identifier: Apache-2.0
"""The phrasings of every operation: (English ones, Chinese ones)."""

_RESTORE = {
  "undo_jpeg": (
    ("Remove the compression artifacts.", "Clean up the JPEG blocks in this "
     "picture.", "Restore this heavily compressed picture."),
    ("去除压缩痕迹。", "修复这张图片的JPEG压缩失真。",
     "把这张压缩过度的图片还原清晰。"),
  ),
  "undo_downsample": (
    ("Upscale this picture {factor}x and restore its detail.", "Make this "
     "low-resolution picture sharp; it was reduced {factor} times.", "Apply "
     "{factor}x super-resolution."),
    ("把这张图片放大{factor}倍并恢复细节。", "对图片做{factor}倍超分辨率。",
     "这张图片的分辨率低了{factor}倍，请恢复清晰。"),
  ),
  "undo_gaussian_noise": (
    ("Remove the noise.", "Denoise this picture.", "Clean the grain from this "
     "photo and keep its detail."),
    ("去除噪点。", "给这张图片降噪。", "清除颗粒噪声，保留细节。"),
  ),
  "undo_poisson_noise": (
    ("Remove the shot noise.", "Denoise this picture, which was taken with "
     "few photons.", "Clean up the noise of the sensor."),
    ("去除散粒噪声。", "这张图片光子太少，请降噪。", "清除传感器噪声。"),
  ),
  "undo_motion_blur": (
    ("Remove the motion blur.", "The camera moved; make the picture sharp.",
     "Undo the camera shake."),
    ("去除运动模糊。", "拍摄时手抖了，请把图片变清晰。",
     "消除相机抖动造成的模糊。"),
  ),
  "undo_defocus": (
    ("Bring this picture into focus.", "Remove the defocus blur.", "Sharpen "
     "this out-of-focus photo."),
    ("把失焦的图片变清晰。", "去除失焦模糊。", "这张照片没对上焦，请修复。"),
  ),
  "undo_low_light": (
    ("Brighten this dark picture and remove its noise.", "Restore this "
     "underexposed photo to normal light.", "Enhance the low light."),
    ("提亮这张暗图并去噪。", "把曝光不足的照片恢复到正常光线。",
     "增强低光照片。"),
  ),
  "undo_fade": (
    ("Bring back the faded colors.", "Restore contrast and color of this faded "
     "print.", "Undo the fading of this photo."),
    ("恢复褪色的颜色。", "还原这张褪色照片的对比度和色彩。",
     "修复照片的褪色。"),
  ),
  "undo_grey": (
    ("Colorize this picture.", "Add natural colors to this black-and-white "
     "photo.", "Give this gray picture its color back."),
    ("给这张图片上色。", "为黑白照片添加自然的颜色。",
     "恢复这张灰度图的色彩。"),
  ),
  "undo_haze": (
    ("Remove the haze.", "Dehaze this picture.", "Clear the fog."),
    ("去除雾霾。", "给这张图片去雾。", "让画面变得通透，去掉雾气。"),
  ),
  "undo_rain": (
    ("Remove the rain.", "Take the rain streaks out of this picture.",
     "Derain this photo."),
    ("去除雨丝。", "把图片里的雨去掉。", "给这张照片去雨。"),
  ),
  "undo_scratches": (
    ("Remove the scratches and specks.", "Repair the scratches on this photo.",
     "Clean the dust and scratches off this picture."),
    ("去除划痕和斑点。", "修复照片上的划痕。", "清除图片上的灰尘和划痕。"),
  ),
  "undo_hole": (
    ("Fill in the missing parts.", "Inpaint the blank areas so that they match "
     "their surroundings.", "Complete the parts that are covered."),
    ("补全缺失的部分。", "修补空白区域，使其与周围一致。",
     "把被遮住的地方补全。"),
  ),
  "undo_old_photo": (
    ("Restore this old photo.", "Repair this old photo: remove scratches and "
     "grain and bring back its colors.", "Make this worn print look new."),
    ("修复这张老照片。", "翻新老照片：去除划痕和颗粒，恢复颜色。",
     "让这张旧照片焕然一新。"),
  ),
  "apply_jpeg": (
    ("Compress this picture to JPEG quality {quality}.", "Add JPEG artifacts "
     "of quality {quality}."),
    ("把图片压缩到JPEG质量{quality}。", "加上质量为{quality}的JPEG压缩失真。"),
  ),
  "apply_downsample": (
    ("Reduce the resolution {factor} times and enlarge it again ({enlarged}).",
     "Make this picture low-resolution: {factor}x, {enlarged}."),
    ("把分辨率降低{factor}倍再放大（{enlarged}）。",
     "做成低分辨率图片：{factor}倍，{enlarged}。"),
  ),
  "apply_gaussian_noise": (
    ("Add Gaussian noise with a sigma of {sigma}.", "Make this picture noisy "
     "(sigma {sigma})."),
    ("加入标准差为{sigma}的高斯噪声。", "让图片带上噪点（标准差{sigma}）。"),
  ),
  "apply_poisson_noise": (
    ("Add shot noise of {photons} photons.", "Simulate a sensor that caught "
     "{photons} photons at white."),
    ("加入{photons}个光子的散粒噪声。",
     "模拟白色处只有{photons}个光子的传感器。"),
  ),
  "apply_motion_blur": (
    ("Blur this picture by a motion of {length} pixels at {angle} degrees.",
     "Add motion blur: {length} pixels, {angle} degrees."),
    ("加上{length}像素、{angle}度的运动模糊。",
     "让图片沿{angle}度方向模糊{length}像素。"),
  ),
  "apply_defocus": (
    ("Put this picture out of focus by a radius of {radius} pixels.", "Add "
     "defocus blur with radius {radius}."),
    ("让图片失焦，半径{radius}像素。", "加上半径为{radius}的失焦模糊。"),
  ),
  "apply_low_light": (
    ("Make this picture dark, at {gain} of its light.", "Simulate low light: "
     "{gain} of the exposure."),
    ("把图片变暗，只留{gain}的光。", "模拟低光：曝光的{gain}。"),
  ),
  "apply_fade": (
    ("Fade this picture to a contrast of {contrast}.", "Make it look like a "
     "faded print with {contrast} of its contrast."),
    ("让图片褪色，对比度为{contrast}。",
     "做成褪色照片，只留{contrast}的对比度。"),
  ),
  "apply_grey": (
    ("Remove all color.", "Make this picture gray."),
    ("去掉所有颜色。", "把图片变成灰度。"),
  ),
  "apply_haze": (
    ("Add haze, {far} thick at the top.", "Cover this scene in fog that hides "
     "{far} of what is far away."),
    ("加上雾，顶部浓度{far}。", "给场景蒙上雾气，远处遮住{far}。"),
  ),
  "apply_rain": (
    ("Add rain at an angle of {angle} degrees.", "Let it rain: {streaks} "
     "streaks, {angle} degrees."),
    ("加上倾斜{angle}度的雨。", "让画面下雨：{streaks}条雨丝，{angle}度。"),
  ),
  "apply_scratches": (
    ("Add {lines} scratches and {specks} specks.", "Wear this print with "
     "{lines} scratches and {specks} specks."),
    ("加上{lines}道划痕和{specks}个斑点。",
     "把照片做旧：{lines}道划痕，{specks}个斑点。"),
  ),
  "apply_hole": (
    ("Cut out a few areas and fill them with gray value {fill}.", "Cover parts "
     "of this picture with gray value {fill}."),
    ("挖掉几块区域，填成灰度{fill}。", "用灰度{fill}遮住图片的一部分。"),
  ),
  "apply_old_photo": (
    ("Make this picture look like an old photo with {lines} scratches.", "Age "
     "this photo: contrast {contrast}, {lines} scratches."),
    ("把图片做成有{lines}道划痕的老照片。",
     "做旧照片：对比度{contrast}，{lines}道划痕。"),
  ),
}  # fmt: skip

_STYLE = {
  "style_sketch": (
    ("Turn this picture into a pencil sketch.", "Redraw it in pencil on white "
     "paper."),
    ("把图片变成铅笔素描。", "用铅笔在白纸上重画这张图。"),
  ),
  "style_watercolour": (
    ("Turn this picture into a watercolor.", "Paint it in watercolors."),
    ("把图片变成水彩画。", "用水彩风格重绘。"),
  ),
  "style_oil": (
    ("Turn this picture into an oil painting.", "Repaint it in oil."),
    ("把图片变成油画。", "用油画风格重绘。"),
  ),
  "style_cartoon": (
    ("Turn this picture into a cartoon with dark outlines.", "Redraw it as a "
     "flat cartoon."),
    ("把图片变成有深色轮廓的卡通画。", "用扁平的卡通风格重绘。"),
  ),
  "style_sepia": (
    ("Give this picture a sepia tone.", "Make it a sepia print."),
    ("给图片加上棕褐色调。", "做成怀旧的棕褐色照片。"),
  ),
  "style_black_and_white": (
    ("Make this picture black and white.", "Turn it into a black-and-white "
     "photo."),
    ("把图片变成黑白。", "做成黑白照片。"),
  ),
  "style_posterise": (
    ("Posterize this picture to {levels} levels per color.",
     "Reduce each color "
     "to {levels} levels."),
    ("把图片做成海报效果，每种颜色{levels}级。",
     "每个颜色通道只留{levels}级。"),
  ),
  "style_pixel_art": (
    ("Turn this picture into pixel art with blocks of {block} pixels.", "Make "
     "it pixel art, {block} pixels a block."),
    ("把图片变成像素画，每块{block}像素。", "做成{block}像素方块的像素风。"),
  ),
  "style_warm": (
    ("Make the colors warmer.", "Give this picture warm light."),
    ("让色调更暖。", "给图片加上暖光。"),
  ),
  "style_cool": (
    ("Make the colors cooler.", "Give this picture cool, bluish light."),
    ("让色调更冷。", "给图片加上偏蓝的冷光。"),
  ),
  "style_night": (
    ("Turn day into night.", "Make this scene look like night."),
    ("把白天变成夜晚。", "让这个场景看起来像夜里。"),
  ),
}  # fmt: skip

_ATTRIBUTE = {
  "recolour": (
    ("Make the {thing} {colour}.", "Change the color of the {thing} to "
     "{colour}.", "Paint the {thing} {colour}."),
    ("把{thing}变成{colour}。", "将{thing}的颜色改为{colour}。",
     "给{thing}涂上{colour}。"),
  ),
  "material": (
    ("Make the {thing} out of {material}.", "Change the material of the "
     "{thing} to {material}.", "Let the {thing} be made of {material}."),
    ("把{thing}的材质换成{material}。", "让{thing}由{material}制成。",
     "将{thing}改成{material}质感。"),
  ),
  "lighter": (
    ("Make the {thing} {percent} % lighter.", "Brighten the {thing} by "
     "{percent} %."),
    ("把{thing}调亮{percent}%。", "让{thing}亮{percent}%。"),
  ),
  "darker": (
    ("Make the {thing} {percent} % darker.", "Darken the {thing} by {percent} "
     "%."),
    ("把{thing}调暗{percent}%。", "让{thing}暗{percent}%。"),
  ),
  "larger": (
    ("Enlarge the {thing} to {percent} % of its size.", "Make the {thing} "
     "larger: {percent} %."),
    ("把{thing}放大到{percent}%。", "让{thing}变大，为原来的{percent}%。"),
  ),
  "smaller": (
    ("Shrink the {thing} to {percent} % of its size.", "Make the {thing} "
     "smaller: {percent} %."),
    ("把{thing}缩小到{percent}%。", "让{thing}变小，为原来的{percent}%。"),
  ),
  "remove": (
    ("Remove the {thing}.", "Take the {thing} out of the picture.", "Delete "
     "the {thing} and keep everything else."),
    ("移除{thing}。", "把{thing}从图中去掉。", "删除{thing}，其余保持不变。"),
  ),
  "add": (
    ("Add {a_thing} {column}.", "Put {a_thing} {column} of the picture."),
    ("在{column}加上{thing}。", "在图片{column}放一个{thing}。"),
  ),
  "add_from": (
    ("Add the {thing} of image 2 {column} of image 1.", "Put the {thing} from "
     "image 2 into image 1, {column}."),
    ("把图2的{thing}加到图1的{column}。",
     "将图2中的{thing}放进图1，{column}。"),
  ),
  "move": (
    ("Move the {thing} so that it is {to}.", "Put the {thing} {to} instead."),
    ("把{thing}移到{to}。", "将{thing}改放在{to}。"),
  ),
  "replace": (
    ("Replace the {thing} with {a_other}.", "Swap the {thing} for {a_other}."),
    ("把{thing}换成{other}。", "用{other}替换{thing}。"),
  ),
  "replace_from": (
    ("Replace the {thing} in image 1 with the object of image 2.", "Swap the "
     "{thing} of image 1 for what image 2 shows."),
    ("把图1中的{thing}换成图2的物体。", "用图2的内容替换图1的{thing}。"),
  ),
}  # fmt: skip

_BACKGROUND = {
  "background": (
    ("Replace the background with {a_place}.", "Put the {thing} in front of "
     "{a_place}.", "Change the background to {a_place} and keep the {thing}."),
    ("把背景换成{place}。", "让{thing}出现在{place}前。",
     "背景改为{place}，{thing}不变。"),
  ),
  "background_from": (
    ("Replace the background of image 1 with image 2.", "Put the {thing} of "
     "image 1 in front of image 2."),
    ("把图1的背景换成图2。", "将图1的{thing}放到图2前面。"),
  ),
  "background_colour": (
    ("Make the background plain {colour}.", "Replace the background with a "
     "plain {colour} one."),
    ("把背景换成纯{colour}。", "背景改为单一的{colour}。"),
  ),
  "background_removed": (
    ("Remove the background and keep the {thing}.", "Cut out the {thing} on a "
     "transparent background.", "Make the background transparent."),
    ("去除背景，保留{thing}。", "抠出{thing}，背景透明。", "把背景变透明。"),
  ),
}  # fmt: skip

_TEXT = {
  "text_change": (
    ('Change the text "{old}" to "{new}".', 'Replace "{old}" with "{new}".',
     'Let the sign say "{new}" instead of "{old}".'),
    ("把文字“{old}”改成“{new}”。", "将“{old}”替换为“{new}”。",
     "让牌子上的“{old}”变成“{new}”。"),
  ),
  "text_remove": (
    ('Remove the text "{old}".', 'Erase "{old}" from the sign.'),
    ("去掉文字“{old}”。", "擦除牌子上的“{old}”。"),
  ),
  "text_add": (
    ('Write "{new}" in line {line} of the sign.', 'Add the text "{new}" as '
     "line {line} of the sign."),
    ("在牌子第{line}行写上“{new}”。", "在牌子的第{line}行加上文字“{new}”。"),
  ),
  "text_colour": (
    ('Make the text "{old}" {colour}.', 'Change the color of "{old}" to '
     "{colour}."),
    ("把文字“{old}”变成{colour}。", "将“{old}”的颜色改为{colour}。"),
  ),
}  # fmt: skip

_MAPS = {
  "edges": ("edge map", "边缘图"),
  "line_art": ("line drawing", "线稿"),
  "grey": ("grayscale picture", "灰度图"),
  "regions": ("map of regions", "区域分割图"),
  "depth": ("map of depth layers", "深度层次图"),
}


def _map_phrases(name: str) -> dict[str, tuple]:
  en, zh = _MAPS[name]
  article = "an" if en[0] in "aeiou" else "a"
  return {
    f"picture_to_{name}": (
      (f"Turn this picture into {article} {en}.",
       f"Draw the {en} of this picture."),
      (f"把这张图片转成{zh}。", f"画出这张图片的{zh}。"),
    ),
    f"{name}_to_picture": (
      (f"Make a full-color picture that follows this {en}.",
       f"Turn this {en} into a full-color picture."),
      (f"按照这张{zh}生成彩色图片。", f"把这张{zh}变成彩色图片。"),
    ),
    f"{name}_to_picture_of": (
      (f"Make a picture that follows this {en}: {{description}}",
       f"Turn this {en} into a full-color picture. It shows: {{description}}"),
      (f"按照这张{zh}生成图片：{{description}}",
       f"把这张{zh}变成彩色图片，内容是：{{description}}"),
    ),
  }  # fmt: skip


_STRUCTURE = {
  operation: phrases
  for name in _MAPS
  for operation, phrases in _map_phrases(name).items()
}

_COMPOSE = {
  "compose_one": (
    ("Put the {thing1} of image 2 into image 1, {column1}.", "Place the "
     "{thing1} from image 2 {column1} of image 1."),
    ("把图2的{thing1}放到图1的{column1}。",
     "将图2中的{thing1}合成到图1，{column1}。"),
  ),
  "compose_two": (
    ("Put the {thing1} of image 2 {column1} and the {thing2} of image 3 "
     "{column2} of image 1.", "Combine: image 1 is the background, the "
     "{thing1} from image 2 goes {column1}, the {thing2} from image 3 "
     "{column2}."),
    ("把图2的{thing1}放到图1的{column1}，图3的{thing2}放到{column2}。",
     "以图1为背景，{column1}放图2的{thing1}，{column2}放图3的{thing2}。"),
  ),
  "compose_three": (
    ("Put the {thing1} of image 2 {column1}, the {thing2} of image 3 {column2} "
     "and the {thing3} of image 4 {column3} of image 1.", "Combine: image 1 is "
     "the background; {column1} goes the {thing1} from image 2, {column2} the "
     "{thing2} from image 3 and {column3} the {thing3} from image 4."),
    ("把图2的{thing1}放到图1的{column1}，图3的{thing2}放到{column2}，图4的{thing3}放到{column3}。",
     "以图1为背景，{column1}放图2的{thing1}，{column2}放图3的{thing2}，{column3}放图4的{thing3}。"),
  ),
}  # fmt: skip

TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  **_RESTORE, **_STYLE, **_ATTRIBUTE, **_BACKGROUND, **_TEXT, **_STRUCTURE,
  **_COMPOSE,
}  # fmt: skip
