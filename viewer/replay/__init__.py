"""Shows what a GPT looks at: games with the attention of its heads, as pictures or as one HTML file for the browser.

recording.py   the frames of a replay, from the steps of load_model.play
attention.py   the attention of each head, and what the head looks at over a whole game
kinds.py       which of the next two shows a game
breakout.py    Breakout, of which more is known than its pages; breakout.js in the browser
text.py        any other game, as text; text.js in the browser
pictures.py    pictures with attention, for gif and mp4
document.py    the HTML file, made of page.html (its structure), page.css (its style), gpt.js (the model in JavaScript),
               page.js (everything that moves) and breakout.js or text.js
"""
