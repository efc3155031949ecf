"""Shows what a GPT looks at: games with the attention of its heads, as pictures or as one HTML file for the browser.

recording.py   the frames of a replay, from the steps of load_model.play
attention.py   the attention of each head, and what it amounts to over a game
pictures.py    pictures with attention, for gif and mp4
document.py    the HTML file, made of page.html (the frame), page.css (its looks), gpt.js (the model in the browser) and
               page.js (everything that moves)
"""
