"""Make the tiny embedded assets: two instruction sets and a small Mistral-architecture backbone.

    python -m studies.make_tiny               # everything (data: seconds; backbone: about half an hour on 2 cores)
    python -m studies.make_tiny --data-only   # only the instruction sets

It writes, next to this file (or under --out):

    data/alpaca.train.json, alpaca.val.json  4,000 + 400 general instructions in Alpaca's format plus "kind"
    data/code.train.json,   code.val.json    4,000 + 400 instructions about code, same format
    data/alpaca.choose.json, code.choose.json  200 more, held out like the 400: what settings are chosen on
    tiny/                                    config, float16 weights and byte-level BPE tokenizer (Hugging Face format)
    tiny/pretrain.log                        the pretraining loss every 100 steps

Where the text comes from. All instructions and almost all of the pretraining text are drawn from the word tables and
sentence patterns in this file; the rest is the source of some modules of the Python standard library, read from the
interpreter that runs this script. There is no other source and no network. The pretraining text is declarative prose
and code: it states the facts the instructions ask about, and shows the operations at work, but holds no instruction
and response pairs. Some documents report requests ("Anna asked: ...") without any answer, and some put random prose
under the three headings of the prompt, so that the words and markers of a prompt are known to the backbone.

What is held out. Every table (countries, animals, names, identifiers, file names ...) is cut once, by a hash of the
word, into a training part and a held-out part. Training examples draw from the first and validation examples from the
second, so a validation item (a country, a name, a variable ...) never occurs in the training split. Only the
wording of the question and closed words (verbs of an operation, keywords) are shared. The backbone has read about all
items in its pretraining prose, as a large model would have.

The same seed, versions, machine and thread count give the same files.
"""
import argparse, hashlib, importlib.util, json, math, random, re, time
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- word tables
class Table:
    """Rows of words, cut into .train and .val by a hash of the row's word without a plural s, so that a word which is in
    several tables is on the same side in all. `open` tables are mixed with made-up words in the pretraining text."""
    def __init__(self, text, open=False):
        self.all = [tuple(c.strip() for c in row.split(",")) for row in re.split(r"[;\n]", text) if row.strip()]
        assert len(set(r[0] for r in self.all)) == len(self.all), [r for r in self.all if sum(q[0] == r[0] for q in self.all) > 1]
        self.open = open
        self.add([])
    def add(self, rows):
        known = {r[0] for r in self.all}
        self.all += [r for r in ((p.lower(), w.lower()) for p, w in rows) if r[0] not in known and not r[1].endswith(("s", "x", "ch", "y", "f"))]
        stem = lambda row: row[0].split()[-1].lower().replace("ies", "y").rstrip("s")
        held = lambda row: hashlib.sha256(stem(row).encode()).digest()[0] % 4 == 0
        self.val, self.train = [r for r in self.all if held(r)], [r for r in self.all if not held(r)]

COUNTRY = Table("""France,Paris,Europe,French;Spain,Madrid,Europe,Spanish;Italy,Rome,Europe,Italian;Germany,Berlin,Europe,German;Portugal,Lisbon,Europe,Portuguese
Poland,Warsaw,Europe,Polish;Greece,Athens,Europe,Greek;Hungary,Budapest,Europe,Hungarian;Norway,Oslo,Europe,Norwegian;Sweden,Stockholm,Europe,Swedish;Denmark,Copenhagen,Europe,Danish
Finland,Helsinki,Europe,Finnish;Iceland,Reykjavik,Europe,Icelandic;Ireland,Dublin,Europe,English;Austria,Vienna,Europe,German;Romania,Bucharest,Europe,Romanian
Bulgaria,Sofia,Europe,Bulgarian;Croatia,Zagreb,Europe,Croatian;Serbia,Belgrade,Europe,Serbian;Ukraine,Kyiv,Europe,Ukrainian;Albania,Tirana,Europe,Albanian;Latvia,Riga,Europe,Latvian
Japan,Tokyo,Asia,Japanese;China,Beijing,Asia,Chinese;India,Delhi,Asia,Hindi;Thailand,Bangkok,Asia,Thai;Vietnam,Hanoi,Asia,Vietnamese;Nepal,Kathmandu,Asia,Nepali;Iran,Tehran,Asia,Persian
Iraq,Baghdad,Asia,Arabic;Jordan,Amman,Asia,Arabic;Lebanon,Beirut,Asia,Arabic;Qatar,Doha,Asia,Arabic;Egypt,Cairo,Africa,Arabic;Kenya,Nairobi,Africa,Swahili;Morocco,Rabat,Africa,Arabic
Ghana,Accra,Africa,English;Nigeria,Abuja,Africa,English;Senegal,Dakar,Africa,French;Angola,Luanda,Africa,Portuguese;Tunisia,Tunis,Africa,Arabic;Uganda,Kampala,Africa,English
Peru,Lima,South America,Spanish;Chile,Santiago,South America,Spanish;Brazil,Brasilia,South America,Portuguese;Colombia,Bogota,South America,Spanish;Ecuador,Quito,South America,Spanish
Uruguay,Montevideo,South America,Spanish;Cuba,Havana,North America,Spanish;Canada,Ottawa,North America,English;Jamaica,Kingston,North America,English;Australia,Canberra,Oceania,English
Fiji,Suva,Oceania,English""")
OPPOSITE = Table("""hot,cold;big,small;tall,short;fast,slow;happy,sad;rich,poor;light,heavy;dark,bright;wet,dry;clean,dirty;open,closed;full,empty;early,late;easy,difficult;hard,soft
high,low;loud,quiet;near,far;new,old;strong,weak;thick,thin;wide,narrow;deep,shallow;sweet,sour;true,false;cheap,expensive;brave,afraid;kind,cruel;safe,dangerous;sharp,blunt
smooth,rough;tight,loose;awake,asleep;alive,dead;right,wrong;first,last;inside,outside;up,down;above,below;before,after;always,never;day,night;summer,winter;north,south;east,west
begin,end;buy,sell;give,take;push,pull;win,lose;love,hate;laugh,cry;arrive,leave;remember,forget;question,answer;friend,enemy;war,peace;success,failure;top,bottom;front,back""")
PLURAL = Table("""box,boxes;child,children;mouse,mice;foot,feet;tooth,teeth;goose,geese;man,men;woman,women;knife,knives;leaf,leaves;wolf,wolves;life,lives;wife,wives;shelf,shelves
half,halves;loaf,loaves;city,cities;story,stories;baby,babies;party,parties;lady,ladies;country,countries;berry,berries;fly,flies;bus,buses;glass,glasses;dish,dishes;watch,watches
brush,brushes;church,churches;fox,foxes;class,classes;dress,dresses;bench,benches;peach,peaches;potato,potatoes;tomato,tomatoes;hero,heroes;key,keys;toy,toys;boy,boys;day,days;car,cars
tree,trees;house,houses;bird,birds;river,rivers;star,stars;door,doors;window,windows;flower,flowers;student,students;teacher,teachers;letter,letters;number,numbers;person,people;ox,oxen
sheep,sheep;fish,fish;thief,thieves""")
PAST = Table("""go,went;see,saw;eat,ate;drink,drank;sing,sang;swim,swam;run,ran;write,wrote;read,read;speak,spoke;break,broke;take,took;give,gave;come,came;know,knew;grow,grew;fly,flew
draw,drew;buy,bought;bring,brought;think,thought;teach,taught;catch,caught;find,found;hold,held;keep,kept;sleep,slept;feel,felt;leave,left;lose,lost;meet,met;pay,paid;say,said;sell,sold
send,sent;sit,sat;stand,stood;tell,told;win,won;wear,wore;drive,drove;ride,rode;rise,rose;fall,fell;forget,forgot;begin,began;build,built;choose,chose;hear,heard;make,made;walk,walked
talk,talked;play,played;jump,jumped;look,looked;open,opened;close,closed;cook,cooked;wash,washed;paint,painted;carry,carried;study,studied;try,tried;stop,stopped;plan,planned""")
COMPARE = Table("""big,bigger,biggest;small,smaller,smallest;tall,taller,tallest;short,shorter,shortest;fast,faster,fastest;slow,slower,slowest;happy,happier,happiest;sad,sadder,saddest
rich,richer,richest;poor,poorer,poorest;light,lighter,lightest;heavy,heavier,heaviest;dark,darker,darkest;bright,brighter,brightest;wet,wetter,wettest;dry,drier,driest
clean,cleaner,cleanest;early,earlier,earliest;easy,easier,easiest;hard,harder,hardest;soft,softer,softest;high,higher,highest;low,lower,lowest;loud,louder,loudest;quiet,quieter,quietest
near,nearer,nearest;new,newer,newest;old,older,oldest;strong,stronger,strongest;weak,weaker,weakest;thick,thicker,thickest;thin,thinner,thinnest;wide,wider,widest;deep,deeper,deepest
sweet,sweeter,sweetest;cheap,cheaper,cheapest;good,better,best;bad,worse,worst;warm,warmer,warmest;cool,cooler,coolest;young,younger,youngest;long,longer,longest;kind,kinder,kindest
safe,safer,safest;sharp,sharper,sharpest;funny,funnier,funniest""")
YOUNG = Table("""dog,puppy;cat,kitten;cow,calf;horse,foal;sheep,lamb;goat,kid;pig,piglet;lion,cub;deer,fawn;kangaroo,joey;duck,duckling;goose,gosling;hen,chick;swan,cygnet;frog,tadpole
rabbit,bunny;bear,cub;wolf,pup;fox,kit;seal,pup;whale,calf;elephant,calf;eagle,eaglet;owl,owlet;spider,spiderling;butterfly,caterpillar;tiger,cub;donkey,foal;giraffe,calf;camel,calf
bat,pup;beaver,kit;hare,leveret;pigeon,squab;hawk,chick;penguin,chick;zebra,foal;mouse,pup""")
SOUND = Table("""dog,barks;cat,meows;cow,moos;horse,neighs;sheep,bleats;pig,grunts;lion,roars;duck,quacks;hen,clucks;rooster,crows;frog,croaks;wolf,howls;bee,buzzes;snake,hisses
owl,hoots;mouse,squeaks;bird,sings;elephant,trumpets;donkey,brays;goose,honks;turkey,gobbles;pigeon,coos;crow,caws;bear,growls;monkey,chatters;cricket,chirps;goat,bleats;tiger,roars
hyena,laughs;parrot,talks;fly,buzzes;seal,barks;kitten,purrs;sparrow,chirps;eagle,screams;camel,grunts""")
HOME = Table("""bee,hive;bird,nest;dog,kennel;horse,stable;pig,sty;spider,web;rabbit,burrow;bear,den;lion,den;fish,water;whale,sea;shark,sea;camel,desert;penguin,ice;monkey,trees
cow,barn;hen,coop;ant,anthill;mole,ground;bat,cave;frog,pond;duck,pond;crab,beach;eagle,mountains;tiger,jungle;parrot,jungle;beaver,lodge;fox,den;owl,forest;deer,forest;seal,sea
lizard,desert;squirrel,trees;sheep,fields;crocodile,river;otter,river""")
COLOUR = Table("""grass,green;snow,white;coal,black;blood,red;the sky,blue;a lemon,yellow;a carrot,orange;milk,white;night,black;a leaf,green;the sun,yellow;a tomato,red
a strawberry,red;a banana,yellow;a pumpkin,orange;chocolate,brown;mud,brown;an elephant,grey;a cloud,white;a cherry,red;a pea,green;a plum,purple;a flamingo,pink;a pig,pink;a frog,green
a raven,black;a bear,brown;a swan,white;the sea,blue;ash,grey;a cucumber,green;butter,yellow;wood,brown;salt,white;sugar,white;a mouse,grey;a violet,purple;a canary,yellow;a brick,red
coffee,brown;ink,blue;lettuce,green;rice,white;tar,black;soil,brown;fire,red;corn,yellow;a tangerine,orange;lavender,purple;cotton,white""")
# Category, plural, and its members; the first three are "the three" whenever three are named.
CATEGORY = Table("""fruit,fruits,apple,pear,plum,cherry;vegetable,vegetables,carrot,onion,cabbage,potato;colour,colours,red,blue,green,yellow;tool,tools,hammer,saw,drill,wrench
bird,birds,robin,eagle,owl,sparrow;fish,fish,salmon,trout,cod,tuna;tree,trees,oak,pine,birch,maple;flower,flowers,rose,tulip,daisy,lily;insect,insects,ant,bee,fly,beetle
metal,metals,iron,gold,copper,silver;drink,drinks,water,milk,tea,juice;sport,sports,football,tennis,golf,hockey;instrument,instruments,piano,guitar,drum,violin
season,seasons,spring,summer,autumn,winter;language,languages,French,English,German,Spanish;country,countries,France,Italy,Japan,Brazil;city,cities,Paris,London,Rome,Tokyo
planet,planets,Mars,Venus,Saturn,Jupiter;shape,shapes,circle,square,triangle,star;vehicle,vehicles,car,bus,train,truck;dessert,desserts,cake,pie,pudding,tart
grain,grains,wheat,rice,oats,barley;spice,spices,pepper,ginger,salt,cinnamon;pet,pets,dog,cat,hamster,parrot;reptile,reptiles,snake,lizard,turtle,crocodile
relative,relatives,aunt,uncle,cousin,nephew;emotion,emotions,joy,anger,fear,pride;winter sport,winter sports,skiing,skating,curling,sledding;month,months,January,March,June,August
weekday,weekdays,Monday,Tuesday,Friday,Thursday;room,rooms,kitchen,bedroom,bathroom,hall;garment,garments,shirt,coat,skirt,sweater;shoe,shoes,boot,sandal,slipper,sneaker
hat,hats,cap,beret,helmet,bonnet;nut,nuts,almond,walnut,hazelnut,cashew;dance,dances,waltz,tango,polka,samba;gem,gems,ruby,diamond,emerald,pearl
school subject,school subjects,history,biology,music,chemistry;ocean,oceans,Atlantic,Pacific,Arctic,Indian;gas,gases,oxygen,helium,nitrogen,hydrogen;toy,toys,doll,kite,puzzle,ball
game,games,chess,cards,dominoes,checkers;dairy product,dairy products,cheese,butter,yogurt,cream;bag,bags,purse,suitcase,backpack,basket""")
JOB = Table("""baker,bakes bread;teacher,teaches children;farmer,grows crops;doctor,treats sick people;pilot,flies planes;painter,paints pictures;writer,writes books;singer,sings songs
driver,drives a bus;tailor,makes clothes;carpenter,builds with wood;plumber,repairs pipes;gardener,looks after gardens;butcher,sells meat;florist,sells flowers;barber,cuts hair
dentist,treats teeth;vet,treats animals;judge,works in a court;nurse,cares for patients;cook,prepares meals;waiter,serves food;sailor,works on a ship;miner,digs for coal
fisherman,catches fish;hunter,hunts animals;librarian,lends books;photographer,takes photos;musician,plays music;actor,plays in films;architect,designs houses;mechanic,repairs cars
postman,delivers letters;astronaut,travels in space;jeweller,sells rings;shepherd,looks after sheep;detective,solves crimes;firefighter,puts out fires;soldier,fights in an army
clown,makes people laugh;translator,translates texts;programmer,writes programs;guard,protects a building;king,rules a country;tutor,gives lessons;cleaner,cleans rooms;potter,makes pots
brewer,makes beer;mason,builds walls;optician,sells glasses;chemist,sells medicine;astronomer,studies stars;botanist,studies plants;cobbler,repairs shoes""")
USE = Table("""hammer,drive nails;saw,cut wood;knife,cut bread;pen,write letters;brush,paint walls;broom,sweep the floor;needle,sew clothes;spoon,eat soup;shovel,dig holes
key,open a lock;ladder,climb up;stapler,join pages;oven,bake cakes;kettle,boil water;camera,take photos;clock,tell the time;umbrella,stay dry;towel,dry hands;soap,wash hands
comb,tidy hair;rake,gather leaves;axe,chop trees;telescope,look at stars;microscope,look at cells;thermometer,measure temperature;ruler,measure length;scale,measure weight
map,find the way;compass,find north;lamp,light a room;candle,light the dark;iron,smooth shirts;fridge,keep food cold;heater,keep a room warm;rope,tie things;net,catch fish
glue,stick things together;eraser,remove pencil marks;pillow,rest the head;blanket,keep warm;mirror,see oneself;wheelbarrow,carry soil;bucket,carry water;cup,drink tea
calculator,add numbers;bell,call people;toothbrush,clean teeth;fan,cool a room;whistle,make a signal;drill,make holes""")
KIND = Table("""dog,animal;cat,animal;horse,animal;lion,animal;rabbit,animal;eagle,animal;frog,animal;whale,animal;sheep,animal;tiger,animal;monkey,animal;mouse,animal;goat,animal
fox,animal;oak,plant;rose,plant;tulip,plant;fern,plant;cactus,plant;pine,plant;daisy,plant;lily,plant;moss,plant;birch,plant;maple,plant;ivy,plant;clover,plant;bamboo,plant
hammer,object;lamp,object;chair,object;book,object;clock,object;spoon,object;table,object;mirror,object;bottle,object;candle,object;pencil,object;bucket,object;basket,object
ladder,object""")
MOOD = Table("""wonderful,positive;terrible,negative;delicious,positive;awful,negative;excellent,positive;horrible,negative;lovely,positive;boring,negative;great,positive
useless,negative;perfect,positive;dreadful,negative;beautiful,positive;ugly,negative;fantastic,positive;disappointing,negative;charming,positive;broken,negative;superb,positive
nasty,negative;brilliant,positive;poor,negative;pleasant,positive;annoying,negative;amazing,positive;tasteless,negative;delightful,positive;dull,negative;splendid,positive;rude,negative
helpful,positive;dirty,negative;friendly,positive;noisy,negative;fresh,positive;rotten,negative;comfortable,positive;painful,negative;cosy,positive;stale,negative""")
ORDER = Table("""Monday,Tuesday;Tuesday,Wednesday;Wednesday,Thursday;Thursday,Friday;Friday,Saturday;Saturday,Sunday;Sunday,Monday;January,February;February,March;March,April;April,May
May,June;June,July;July,August;August,September;September,October;October,November;November,December;December,January;spring,summer;summer,autumn;autumn,winter;winter,spring
morning,noon;noon,afternoon;afternoon,evening;evening,night;first,second;second,third;third,fourth;fourth,fifth;one,two;two,three;three,four;four,five;five,six;six,seven;seven,eight
eight,nine;nine,ten""")
NAME = Table("""Anna;Tom;Mary;Peter;Lucy;Jack;Emma;Paul;Nina;Oscar;Clara;David;Sara;Martin;Julia;Simon;Laura;Felix;Rosa;Adam;Alice;Ben;Carol;Daniel;Eva;Frank;Grace;Henry;Irene;James
Karen;Leo;Maria;Noah;Olga;Philip;Ruth;Samuel;Tina;Victor;Wendy;Hugo;Amir;Lena;Omar;Yuki;Ravi;Chen;Fatima;Diego;Ines;Boris;Greta;Ivan;Helen;George;Nora;Mark;Jane;Robert""", open=True)
PLACE = Table("""garden;kitchen;school;library;park;market;station;hotel;museum;office;forest;village;hospital;theatre;church;castle;farm;harbour;bakery;factory;river;street;shop;cellar
attic;airport;square;tower;cinema;barn;stable;valley;restaurant;classroom;bank""", open=True)
THING = Table("""lamp;book;chair;table;clock;picture;letter;basket;bottle;cup;bag;coat;hat;ring;box;ball;bell;candle;carpet;map;mirror;phone;piano;plate;ticket;watch;window;door;knife
key;kite;bike;car;boat;soup;cake;bread;house;room;film;story;scarf;vase;pen;radio;blanket;shirt;camera;drum;gift;poster;sofa;teapot;pillow;ladder;wallet""", open=True)
STATE = Table("""tired;hungry;happy;late;busy;ready;cold;warm;old;new;clean;dirty;ill;angry;calm;proud;strong;weak;quiet;lost;safe;free;young;wet;dry;lonely;thirsty;nervous;careful
polite;lazy;famous;sleepy;clever;red;green;blue;white;heavy;small""")
FOOD = Table("""apples;pears;bread;milk;cheese;butter;eggs;rice;tea;coffee;sugar;salt;soup;honey;plums;grapes;nuts;fish;meat;beans;carrots;onions;potatoes;lemons;oranges;cakes;biscuits
pepper;oil;flour;cherries;peaches;corn;juice;water;chocolate;tomatoes;mushrooms;jam;olives""", open=True)
ACT = Table("""close,the door;open,the window;wash,the cups;bring,the letter;read,the book;carry,the bags;feed,the dog;water,the plants;clean,the kitchen;call,the doctor
help,the children;buy,some bread;wait,at the station;sit,on the chair;write,to the teacher;find,the keys;turn,off the radio;pick,some flowers;cut,the grass;paint,the fence
move,the table;fix,the bike;hold,the rope;pass,the salt;try,the soup;lock,the gate;count,the coins;fold,the shirts;pay,the waiter;send,the parcel;sing,a song;speak,more slowly
come,to the party;stay,in the house;leave,the room;light,the candle;fill,the bottle;empty,the basket;check,the time;stop,the music;show,the map;return,the money""")
WHEN = Table("on Monday;on Tuesday;on Friday;on Sunday;on Saturday;on Thursday;in the morning;in the evening;at noon;at night;in May;in June;"
             "in March;in July;in August;in winter;in summer;in spring;yesterday;last week;last year;last night;after lunch;before dinner;at midnight;in April")
CLASS = Table("""Dog;Car;User;Book;Student;City;Song;Order;Point;House;Cat;Player;Game;Robot;Shop;Ticket;Movie;Teacher;Tree;Animal;Person;Account;Boat;Phone;Room;Bird;Card;Letter;Plant
Garden;Team;Table;Window;Ball;Horse;Ship;Bank;Hotel;Farm;Clock""", open=True)
# Identifiers: plural, singular (lists, loops, tables), then fields, functions, files.
MANY = Table("""prices,price;names,name;cities,city;dogs,dog;students,student;apples,apple;orders,order;books,book;songs,song;users,user;scores,score;words,word;files,file;cars,car
items,item;points,point;colors,color;friends,friend;teachers,teacher;letters,letter;days,day;cats,cat;horses,horse;trees,tree;houses,house;players,player;games,game;lines,line
numbers,number;values,value;rows,row;keys,key;pages,page;images,image;movies,movie;tickets,ticket;rooms,room;tasks,task;events,event;clients,client;cards,card;birds,bird;boxes,box
countries,country;rivers,river;parts,part;nodes,node;errors,error;tables,table;flowers,flower;teams,team;photos,photo;stars,star;ships,ship;planes,plane;coins,coin;shoes,shoe;cups,cup
lamps,lamp;stories,story;recipes,recipe;hotels,hotel;doctors,doctor;farms,farm;paths,path;tags,tag;records,record""", open=True)
MANY.add((w + "s", w) for t in (THING, CLASS, HOME) for w, *_ in t.all)
FIELD = Table("""age;title;price;name;city;email;color;size;weight;height;score;date;country;phone;level;rank;width;length;speed;status;year;month;owner;author;street;type;count;total
cost;job;salary;points;language;grade;brand;model;rating;stock;gender;code;category;address;state;team;distance;balance;text;note""", open=True)
VERB = Table("get;add;find;count;show;make;load;save;send;read;check;sort;clean;print;move;build;parse;update;open;close;draw;merge;copy;test;filter;start;fetch;pack;rename;reset")
FILE = Table("""data;notes;users;prices;report;names;config;orders;letter;words;book;story;scores;log;list;input;results;songs;towns;recipe;index;photos;plan;menu;lines;diary;sales;text
backup;table;poem;map;task;draft;students""", open=True)
COLOR = Table("red;blue;green;white;black;orange;purple;brown;pink;grey;yellow;gold;silver;navy;teal;olive;maroon;lime")
TAG = Table("h1;h2;h3;p;div;span;button;table;ul;li;body;nav;header;footer;section;article;form;label;main;img;aside;pre;code;td;th;ol;em;strong")

# ---------------------------------------------------------------- drawing
SYLLABLES = [a + b for a in "b d f g k l m n p r s t v z br st tr pl".split() for b in "a e i o u an el in or us".split()]
an = lambda w: ("an " if w[0] in "aeiouAEIOU" else "a ") + w
cap = lambda s: s[:1].upper() + s[1:]

class Draw:
    """Draws rows from one side of the tables: "train", "val", or "all" (pretraining). In the pretraining text the open
    tables are mixed with made-up words, and one document keeps to a few of their rows: both teach copying."""
    def __init__(self, side, rng, made_up=.2): self.side, self.rng, self.made_up, self.pool = side, rng, made_up, None
    def __call__(self, table):
        if self.pool is None or not table.open: return self.fresh(table)
        seen = self.pool.setdefault(id(table), [])
        while len(seen) < 3:
            if (r := self.fresh(table)) not in seen: seen.append(r)
        return self.rng.choice(seen)
    def fresh(self, table):
        row = self.rng.choice(getattr(table, self.side))
        if self.side == "all" and table.open and self.rng.random() < self.made_up:
            w = self.word()
            row = (cap(w) if row[0][0].isupper() else w,) if len(row) == 1 else (w + "s", w)
        return row
    def word(self): return "".join(self.rng.choices(SYLLABLES, k=self.rng.choice((1, 2, 2, 3))))
    def some(self, table, k):
        out = []
        while len(out) < k:
            if (w := self(table)[0]) not in out: out.append(w)
        return out
    def pick(self, text): return self.rng.choice(text.split("|"))

def row(table):
    """Slots x y z w for the columns of a row; ax, ay with an article; Cx, Cy, Ax capitalised."""
    def slots(d):
        r = d(table)
        y = r[min(1, len(r) - 1)]
        return dict(zip("xyzwuv", r)) | {"ax": an(r[0]), "ay": an(y), "Cx": cap(r[0]), "Cy": cap(y), "Ax": cap(an(r[0]))}
    return slots

def people(d):
    """Slots every pattern may use: names n m, place p, things o q, their state a, time t, a small number k."""
    (n, m), (o, q) = d.some(NAME, 2), d.some(THING, 2)
    return dict(n=n, m=m, p=d(PLACE)[0], o=o, q=q, a=d(STATE)[0], t=d(WHEN)[0], k=str(d.rng.randint(2, 99)))

def sentence(d):
    """A sentence "$s is $r." with l the subject inside a sentence."""
    if d.rng.random() < .5: s = l = d(NAME)[0]
    else: l = "the " + d(THING)[0]; s = cap(l)
    return dict(s=s, l=l, r=d(STATE)[0] if d.rng.random() < .5 else "in the " + d(PLACE)[0])

act = lambda d: dict(zip("vg", r := d(ACT)), V=cap(r[0]))
foods = lambda d: dict(zip("xyz", d.some(FOOD, 3)))

def kind_of(d):
    x, k = d(KIND)
    g = d.rng.choice("animal plant object".split())
    return dict(x=x, Ax=cap(an(x)), ax=an(x), y=k, ay=an(k), g=an(g), yes="Yes" if g == k else "No")

def odd(d):
    """Two words of one kind and one of another, in any order."""
    by = {}
    for w, g in getattr(KIND, d.side): by.setdefault(g, []).append(w)
    g, h = d.rng.sample([g for g in sorted(by) if len(by[g]) > 1], 2)
    w = d.rng.choice(by[h])
    l = d.rng.sample(by[g], 2) + [w]
    d.rng.shuffle(l)
    return dict(zip("xyz", l)) | dict(w=w, g=g)

def category(d):
    r = d(CATEGORY)
    x = d.rng.choice(r[2:])
    return dict(x=x, c=r[0], cs=r[1], e=r[2], f=r[3], h=r[4])

def code(d):
    """Identifiers: list xs of x, another ys, fields f h, function v_x, file l, class C, tag, color, k."""
    (xs, x), (ys, y) = d(MANY), d(MANY)
    while ys == xs: ys, y = d(MANY)
    f, h = d.some(FIELD, 2)
    fn = d.rng.choice((d(VERB)[0] + "_" + x, d(VERB)[0] + "_" + f, d(VERB)[0] + "_" + xs))
    return dict(xs=xs, x=x, ys=ys, y=y, f=f, h=h, fn=fn, l=d(FILE)[0], C=d(CLASS)[0], tag=d(TAG)[0], col=d(COLOR)[0],
                n=d(NAME)[0], k=str(d.rng.randint(2, 99)), j=str(d.rng.randint(2, 99)), o=d(FOOD)[0], q=d(FOOD)[0])

fill = lambda pattern, s: re.sub(r"\$([A-Za-z]+)", lambda m: s[m[1]], pattern)

# ---------------------------------------------------------------- the kinds
# Each: name, slots, phrasings, input, output, pretraining patterns ("|" separates alternatives).
GENERAL, CODE = [], []
def G(*a): GENERAL.append(a)
def C(name, ask, out, prose, inp="", slots=code): CODE.append((name, slots, ask, inp, out, prose))

G("capital", row(COUNTRY), "What is the capital of $x?|Name the capital city of $x.|Which city is the capital of $x?|Give the capital of $x.|Tell me the capital of $x.",
  "", "The capital of $x is $y.", "$y is the capital of $x.|The capital of $x is $y.|$x has its capital in $y.|The capital city of $x is called $y.|People who visit $x often begin in $y, its capital.|$n went to $y, the capital of $x.|In $x, the largest news comes from the capital, $y.")
G("country", row(COUNTRY), "Which country has $y as its capital?|In which country is the city of $y?|Name the country where $y is.|$y is the capital of which country?|Write the name of the country around the city of $y.",
  "", "$y is in $x.", "$y is in $x.|$y is a city in $x.|$n lives in $y, in $x.|The city of $y lies in $x.|From $y one can see much of $x.|$y, $x")
G("continent", row(COUNTRY), "On which continent is $x?|Name the continent of $x.|Where in the world is $x?|Which continent does $x belong to?|Give the continent of the country $x.",
  "", "$x is in $z.", "$x is in $z.|$x is a country in $z.|One of the countries of $z is $x.|$n travelled through $z and saw $x.|$z is the continent of $x.")
G("language", row(COUNTRY), "Which language is spoken in $x?|What language do people speak in $x?|Name the language of $x.|Give the main language of $x.|I am going to $x. Which language should I learn?",
  "", "People in $x speak $w.", "People in $x speak $w.|In $x people speak $w.|$w is spoken in $x.|The language of $x is $w.|$n learned $w before going to $x.")
def pair(d):
    x, y = d(OPPOSITE)
    if d.rng.random() < .5: x, y = y, x
    return dict(x=x, y=y, Cx=cap(x), Cy=cap(y))
G("opposite", pair, 'What is the opposite of "$x"?|Give the opposite of the word $x.|Name a word that means the opposite of $x.|Write the opposite of "$x".|Which word is the opposite of $x?',
  "", "$y", "The opposite of $x is $y.|$Cx is the opposite of $y.|$Cx and $y are opposites.|Not $x but $y.|$Cy.\nThat is the opposite of $x.|Something that is not $x may be $y.|What was $x for $n was $y for $m.")
G("plural", row(PLURAL), 'What is the plural of "$x"?|Give the plural of $x.|Write the plural form of the noun $x.|Change the word $x to the plural.|How do you write more than one $x?',
  "", "$y", "One $x, two $y.|The plural of $x is $y.|$n has one $x and $m has three $y.|One $x and another $x are two $y.|$Cy is the plural of $x.|There are many $y here, and each $x is different.")
G("past", row(PAST), 'What is the past tense of "$x"?|Give the past tense of the verb $x.|Write the verb $x in the past tense.|Change the verb $x to the past.|Which word is the past form of $x?',
  "", "$y", "Today I $x, yesterday I $y.|The past tense of $x is $y.|They $x every day. Last week they $y too.|$Cy is the past of $x.|I often $x here, and in old times people $y here too.|$n $y yesterday. Today $m will $x.")
G("comparative", row(COMPARE), 'What is the comparative of "$x"?|Give the comparative form of $x.|Complete: $x, ..., $z.|Write the comparative of the word $x.|Which word means "more $x"?',
  "", "$y", "$Cx, $y, $z.|The $o is $x, the $q is $y.|The comparative of $x is $y and the superlative is $z.|More $x is called $y.|$n is $y than $m.|This $o is $y than that one, which is also $x.|$Cy means more $x, and $z means most $x.")
G("young", row(YOUNG), "What is a young $x called?|Give the name of a baby $x.|Name the young of the $x.|What do we call a young $x?|Write the word for the child of $ax.",
  "", "A young $x is called $ay.", "A young $x is called $ay.|The young of the $x is $ay.|The $y will grow into $ax.|A baby $x is $ay.|The $x looked after her $y.|$Ax was once $ay.")
G("sound", row(SOUND), "What sound does $ax make?|How does $ax sound?|Name what the $x does with its voice.|Write a short sentence about the voice of the $x.|Give the sound of the $x.",
  "", "$Ax $y.", "$Ax $y.|The $x $y in the $p.|Every $x $y.|$n heard that the $x $y.|When it speaks, $ax $y.|Listen: the $x $y again.")
G("home", row(HOME), "Where does $ax live?|Name the home of the $x.|Give the place where $ax lives.|In what place would you find $ax?|Write where the $x has its home.",
  "", "The home of the $x is the $y.", "The home of the $x is the $y.|The $x lives in the $y.|In the $y $n found $ax.|$Ax is at home in the $y.|The $y is where the $x lives.|After the day the $x goes back to the $y.")
G("colour", row(COLOUR), "What colour is $x?|Give the colour of $x.|Name the colour that $x usually has.|Which colour does $x have?|I want to paint $x. Which colour do I take?",
  "", "The colour of $x is $y.", "The colour of $x is $y.|$Cx is $y.|As $y as $x.|The $o was $y like $x.|$n painted the $x $y, as it really is.|Something $y: $x.")
G("three", category, "Name three $cs.|List three $cs.|Give three examples of $cs.|Write down three $cs.|Tell me three $cs you know.",
  "", "Three $cs are $e, $f and $h.", "Three $cs are $e, $f and $h.|A list of $cs: $e, $f and $h.|Some $cs: $e, $f and $h.|$n knows three $cs: $e, $f and $h.|The best known $cs are $e, $f and $h.")
G("group", category, "What kind of thing is $x?|To which group does $x belong?|Put $x into a category.|Name the category of $x.|Give the general word for $x.",
  "", "It is a kind of $c.", "The word $x: it is a kind of $c.|$n has $x. It is a kind of $c.|The $x is one of the $cs.|Among the $cs there is $x.|One kind of $c is $x.|$n likes all $cs, above all $x.|The $x belongs to the $cs.")
G("job", row(JOB), "Who $y?|Name the person who $y.|What do you call a person who $y?|Which job is it when someone $y?|Give the word for someone who $y.",
  "", "$Ax.", "$Ax is a person who $y.|A person who $y is $ax.|$n is $ax and $y.|Someone who $y is called $ax.|$Ax $y.|Every day the $x $y.|$Ax.\nThis is someone who $y.")
G("define", row(JOB), "Explain what $ax does.|What does $ax do?|Describe the job of $ax.|Define the word $x.|Write one sentence about the work of $ax.",
  "", "$Ax is a person who $y.", "$Ax is a person who $y.|The work of $ax: a person who $y.|$n became $ax, a person who $y.")
G("tool", row(USE), "What do you need to $y?|Name a thing to $y.|Which object helps you to $y?|I want to $y. What should I take?|Give me something to $y.",
  "", "Take the $x to $y.", "Take the $x to $y.|One uses the $x to $y.|To $y you need $ax.|$n took the $x to $y.|The $x is there to $y.|$n wants to $y and looks for the $x.")
G("use", row(USE), "What is the $x used for?|Explain what to do with the $x.|Describe the use of the $x.|Why do people have the $x?|Write what the $x is good for.",
  "", "The $x is used to $y.", "The $x is used to $y.|People use the $x to $y.|$n used the $x to $y.|With the $x one can $y.")
G("yesno", kind_of, "Is $ax $g?|Tell me if $ax is $g.|Answer yes or no: is $ax $g?|True or not: $ax is $g?|Check the claim: $ax is $g.",
  "", "$yes, $ax is $ay.", "$Ax is $ay.|Yes, $ax is $ay.|No, $ax is $ay.|Is $ax $g? $yes, $ax is $ay.|$n said that $ax is $ay.|Like every $x, it is $ay.")
G("classify", kind_of, "Is $x an animal, a plant or an object?|Classify $x as animal, plant or object.|Animal, plant or object: what is $x?|Sort the word $x: animal, plant or object.|Decide if $x is an animal, a plant or an object.",
  "", "$Ax is $ay.", "$Ax is $ay.|Among animals, plants and objects, $ax is $ay.|The $x, $ay, was in the $p.|$n saw $ay: it was $ax.")
G("odd", odd, "Which word does not belong with the others?|Find the odd one out.|Name the item that does not fit the list.|Which of the three words is different?|Pick the word that does not belong.",
  "$x, $y, $z", "$w", "Of $x, $y and $z, the one that does not belong is $w.|$x, $y, $z\n$w is the odd one out here.|Two of $x, $y, $z are of the kind $g, but not $w.")
G("mood", lambda d: people(d) | row(MOOD)(d), "Is this review positive or negative?|Classify the mood of the review.|Does the writer like it? Answer positive or negative.|Decide if this text is positive or negative.|What is the feeling of the review?",
  "The $o was $x.", "The review is $y.", "The $o was $x. The review is $y.|To call something $x is $y.|$Cx is a $y word.|A $y review: the $o was $x.|$n found the $o $x, so the review was $y.")
G("next", row(ORDER), "What comes after $x?|What follows $x?|Name what comes next after $x.|Which one comes right after $x?|Give the next after $x.",
  "", "After $x comes $y.", "$Cy comes after $x.|After $x comes $y.|$x, then $y|First $x, next $y.|$Cx comes before $y.|$x, $y|$n waited from $x to $y.")
G("question", sentence, "Turn the sentence into a question.|Rewrite this sentence as a question.|Change the statement to a question.|Make a question from the sentence.|Write this as a question.",
  "$s is $r.", "Is $l $r?", '"$s is $r," said $n. "Is $l $r?" asked $m.|Is $l $r? Yes, $s is $r.|$s is $r.\nIs $l $r?|$n asked: "Is $l $r?" Nobody knew that $l is $r.')
G("negative", sentence, "Make the sentence negative.|Say the opposite with the word not.|Rewrite the sentence with \"not\".|Negate this sentence.|Change the statement so that it is denied.",
  "$s is $r.", "$s is not $r.", "$s is $r. No, $l is not $r.|$s is $r.\n$s is not $r.|$s is not $r.|$n thinks that $l is $r, but $l is not $r.")
G("before", sentence, "Put the sentence into the past.|Rewrite this sentence in the past tense.|Change the sentence from now to then.|Write the sentence in the past.|Convert the sentence to the past tense.",
  "$s is $r.", "$s was $r.", "$s is $r.\n$s was $r.|Today $l is $r. Yesterday $l was $r too.|$s was $r.|$s was $r, and $l is $r still.")
G("future", sentence, "Put the sentence into the future.|Rewrite this sentence in the future tense.|Change the sentence to speak about tomorrow.|Write the sentence in the future.|Convert the sentence to the future tense.",
  "$s is $r.", "$s will be $r.", "$s is $r.\n$s will be $r.|$s is $r today and $l will be $r tomorrow.|$s will be $r.|Soon $l will be $r.")
G("polite", act, "Make the request polite.|Rewrite this more politely.|Say this in a friendly way.|Turn the order into a polite request.|Change the command so that it is polite.",
  "$v $g", "Please $v $g.", 'Please $v $g.|$V $g.\nPlease $v $g.|"$V $g," said $n. "Please $v $g," said $m.|$n can $v $g.|"Please $v $g," $n asked.')
G("bullets", foods, "Make a bullet list.|Write the items as a list with bullets.|Convert the sentence to a bullet list.|List the things one per line.|Rewrite this as a list.",
  "We need $x, $y and $z.", "- $x\n- $y\n- $z", "We need $x, $y and $z.\n- $x\n- $y\n- $z|- $x\n- $y\n- $z\n$n bought $x, $y and $z.|The list of $n:\n- $x\n- $y\n- $z")
G("join", foods, "Join the items into one sentence.|Write a sentence from the list.|Turn the list into a sentence.|Rewrite the shopping list as one sentence.|Make one sentence of these items.",
  "$x\n$y\n$z", "We need $x, $y and $z.", "$x\n$y\n$z\nWe need $x, $y and $z.|We need $x, $y and $z.|There was $x, there was $y and $z.")
scene = lambda d: people(d) | {"b": d.pick("met|saw|called|helped|thanked|found")}
G("who", scene, "Who is the sentence about?|Find the name of the person.|Which person is in the text?|Give the name from the sentence.|Name the person in this sentence.",
  "$n lost the $o in the $p $t.", "$n", "$n lost the $o in the $p $t. It was $n.|$n $b $m in the $p $t.|$n lost the $o in the $p $t.\nPoor $n!")
G("where", scene, "Where did it happen?|Find the place in the sentence.|Give the place from the text.|Which place is in the sentence?|Name the place in this sentence.",
  "$n lost the $o in the $p $t.", "In the $p.", "$n lost the $o in the $p $t. It was in the $p.|$n $b $m in the $p $t.\nIn the $p.|In the $p. There $n $b $m.")
G("what", scene, "What was lost?|Find the lost thing in the sentence.|Give the object from the text.|Which thing is missing now?|Name the thing in this sentence.",
  "$n lost the $o in the $p $t.", "The $o.", "$n lost the $o in the $p $t. The $o was gone.|The $o. That is what $n lost in the $p.|$n looked for the $o.\nThe $o was in the $p.")
G("when", scene, "When did it happen?|Find the time in the sentence.|Give the time from the text.|At what time was this?|Tell me when this was.",
  "$n lost the $o in the $p $t.", "It was $t.", "$n lost the $o in the $p $t. It was $t.|It was $t.|It was $t. $n $b $m in the $p $t.")
G("greet", people, "Write a greeting for $n.|Greet $n in a letter.|Write the first line of a letter to $n.|Give me a friendly greeting for $n.|Begin an email to $n.",
  "", "Dear $n, I hope you are well.", "Dear $n, I hope you are well.|Dear $n, I hope you are well. Here it is $a. $m|$m wrote to $n: \"Dear $n, I hope you are well.\"")
G("thank", people, "Write a thank-you note to $n for the $o.|Thank $n for the $o.|$n gave me the $o. Write a short note of thanks.|Write to $n and say thank you for the $o.|Give me a line of thanks to $n for the $o.",
  "", "Dear $n, thank you for the $o. I like it very much.", "Dear $n, thank you for the $o. I like it very much.|$n gave $m the $o. \"Dear $n, thank you for the $o. I like it very much,\" wrote $m.|Thank you for the $o, $n.")
G("quote", sentence, "Put the sentence in quotation marks.|Write this sentence in quotes.|Add quotation marks to the sentence.|Quote this sentence.|Set the text in quotation marks.",
  "$s is $r.", '"$s is $r."', '"$s is $r." These are the words of $n.|$s is $r.\n"$s is $r."|$n read: "$s is $r."')
G("title", people, "Write a title for a story about a $o and a $q.|Give a title to a book about a $o and a $q.|Name a story about a $o and a $q.|Suggest a title for a film about a $o and a $q.|I wrote a story with a $o and a $q. Write a title.",
  "", "The Story of the $o and the $q", "The Story of the $o and the $q|The Story of the $o and the $q is about a $o and a $q.|A $o and a $q are in The Story of the $o and the $q.|$n read The Story of the $o and the $q.")
G("say", lambda d: people(d) | sentence(d), "Write that $n says this.|Report the words of $n.|Add that $n said it.|Say that these are the words of $n.|Rewrite the sentence as what $n said.",
  "$s is $r.", "$n says that $l is $r.", "$n says that $l is $r.|$s is $r.\n$n says that $l is $r.|$n says that $l is $r, and $m says that too.")

# Code. Comments and short texts around the same code are what the backbone reads.
C("length", "Write Python to get the length of the list $xs.|How many items are in the Python list $xs?|Give the Python expression for the number of $xs in the list.|Count the items of the list $xs in Python.|Which Python expression gives the length of $xs?",
  "len($xs)", "# the number of items in $xs\nlen($xs)|The length of $xs is len($xs).|k = len($xs)  # how many $xs|if len($xs) > $k:\n    print(len($xs))")
C("largest", "Write Python to find the largest of the list $xs.|Give the Python expression for the maximum of $xs.|What is the Python code for the biggest value in $xs?|Find the highest item of the list $xs in Python.|Get the maximum of the Python list $xs.",
  "max($xs)", "# the largest item of $xs\nmax($xs)|The maximum of $xs is max($xs).|top = max($xs)  # the biggest of the $xs|print(max($xs), min($xs))")
C("sum", "Write Python to add up all $xs.|Give the Python expression for the sum of $xs.|Add the numbers in the Python list $xs.|What is the Python code for the total of the list $xs?|Compute the sum of the list $xs in Python.",
  "sum($xs)", "# the total of all $xs\nsum($xs)|The sum of $xs is sum($xs).|total = sum($xs)  # add up the $xs|mean = sum($xs) / len($xs)")
C("sort", "Write Python to sort the list $xs.|Give the Python expression for the sorted $xs.|Put the Python list $xs in order.|How do I sort $xs in Python?|Name the Python expression that sorts $xs.",
  "sorted($xs)", "# the $xs in order\nsorted($xs)|The sorted list of $xs is sorted($xs).|for $x in sorted($xs):\n    print($x)|$ys = sorted($xs)")
C("append", "Add $x to the Python list $ys.|Append the variable $x to the list $ys in Python.|Write Python that puts $x at the end of the list $ys.|How do I append $x to $ys in Python?|Extend the Python list $ys with the item $x.",
  "$ys.append($x)", "# add $x to $ys\n$ys.append($x)|$ys = []\n$ys.append($x)|The line $ys.append($x) adds $x to the list $ys.|for $x in $xs:\n    $ys.append($x)")
C("first", "Write Python to get the first item of the list $xs.|Give the first element of the Python list $xs.|How do I get the first of the list $xs in Python?|Name the Python expression for the first value in $xs.|Take the first item from the Python list $xs.",
  "$xs[0]", "# the first item of $xs\n$xs[0]|$x = $xs[0]  # the first of the $xs|The first item of $xs is $xs[0] and the last is $xs[-1].|print($xs[0])")
C("last", "Write Python to get the last item of the list $xs.|Give the last element of the Python list $xs.|How do I get the last of the list $xs in Python?|Name the Python expression for the last value in $xs.|Take the last item from the Python list $xs.",
  "$xs[-1]", "# the last item of $xs\n$xs[-1]|$x = $xs[-1]  # the last of the $xs|The last item of $xs is $xs[-1].|print($xs[-1])")
C("dict", "Get the value of the key $f from the Python dict $x.|Write Python to read $f from the dictionary $x.|How do I look up the key $f in the dict $x?|Give the Python expression for the entry $f of the dict $x.|Look up $f in the Python dictionary $x.",
  '$x["$f"]', '# the $f of the $x\n$x["$f"]|$f = $x["$f"]|$x["$f"] = $k|The entry $f of the dict $x is $x["$f"].|print($x["$f"], $x["$h"])')
C("loop", "Write a Python loop that prints each $x in $xs.|Print all items of the list $xs with a for loop.|Loop over the Python list $xs and print each $x.|Give a for loop that prints every $x in $xs.|How do I print each $x of the list $xs in Python?",
  "for $x in $xs:\n    print($x)", "# print each $x\nfor $x in $xs:\n    print($x)|for $x in $xs:\n    print($x)|for $y in $ys:\n    print($y)\nfor $x in $xs:\n    print($x)|for $x in $xs:\n    $ys.append($x)")
C("check", "Write a Python if that prints $h when $f is over $k.|Print $h in Python if the variable $f is greater than $k.|If $f is above $k, print $h. Write it in Python.|Write Python code: when $f is more than $k, print $h.|Give a Python if statement that prints $h if $f is over $k.",
  "if $f > $k:\n    print($h)", "# print $h when $f is over $k\nif $f > $k:\n    print($h)|if $f > $k:\n    print($h)|if $f > $k:\n    print($h)\nelse:\n    print($f)")
C("function", "Write a Python function $fn that returns $f.|Define a function $fn in Python which returns $f.|Create a Python function called $fn that returns its argument $f.|Give a Python function $fn that takes and returns $f.|I need a Python function $fn with the argument $f, returning it.",
  "def $fn($f):\n    return $f", '# $fn returns $f\ndef $fn($f):\n    return $f|def $fn($f):\n    return $f|def $fn($f):\n    """Return $f."""\n    return $f|def $fn($f, $h):\n    return $f + $h|The function $fn takes $f.\ndef $fn($f):\n    return $f')
C("class", "Write a Python class $C with the attribute $f.|Define a class $C in Python that stores $f.|Create a Python class named $C with a $f.|Give a class $C that keeps its $f in Python.|I need a Python class $C with one attribute $f.",
  "class $C:\n    def __init__(self, $f):\n        self.$f = $f", "# $C with $f\nclass $C:\n    def __init__(self, $f):\n        self.$f = $f|class $C:\n    def __init__(self, $f):\n        self.$f = $f|class $C:\n    def __init__(self, $f, $h):\n        self.$f = $f\n        self.$h = $h")
C("open", "Write Python to read the file $l.txt.|Open the file $l.txt in Python and read its text.|Read the text of $l.txt with Python.|How do I read a file named $l.txt in Python?|Give Python code that reads the file $l.txt.",
  'with open("$l.txt") as f:\n    text = f.read()', '# read $l.txt\nwith open("$l.txt") as f:\n    text = f.read()|with open("$l.txt") as f:\n    text = f.read()|with open("$l.csv") as f:\n    for line in f:\n        print(line)')
C("upper", "Convert the Python string $f to upper case.|Write Python to get $f in capital letters.|Change the string variable $f to upper case in Python.|Give the Python expression for $f in upper case.|How do I make the string $f upper case in Python?",
  "$f.upper()", "# $f in upper case\n$f.upper()|print($f.upper())|$f = $f.upper()  # capital letters|$f.lower()  # lower case\n$f.upper()  # upper case")
C("split", "Split the Python string $f at commas.|Write Python to cut the string $f at each comma.|How do I split $f on commas in Python?|Give the Python expression that splits the string $f at commas.|Convert the string $f to a list by its commas in Python.",
  '$f.split(",")', '# the parts of $f between commas\n$f.split(",")|$xs = $f.split(",")|for $x in $f.split(","):\n    print($x)')
C("join", "Join the Python list $xs with spaces.|Write Python to make one string of the list $xs with spaces.|How do I join $xs with spaces in Python?|Give the Python expression that joins the list $xs by spaces.|Convert the list $xs to one string with spaces in Python.",
  '" ".join($xs)', '# $xs in one string\n" ".join($xs)|text = " ".join($xs)|print(" ".join($xs))')
C("comprehension", "Write a Python list comprehension that doubles each $x in $xs.|Double all $xs with a list comprehension.|Give a Python list of every $x in $xs times two.|Use a list comprehension to double the items $x of $xs.|How do I double each $x of $xs in Python?",
  "[$x * 2 for $x in $xs]", "# double each $x\n[$x * 2 for $x in $xs]|$ys = [$x * 2 for $x in $xs]|[$x + $k for $x in $xs]|[$x for $x in $xs if $x > $k]")
C("try", "Write Python that tries $fn() and prints an error.|Call $fn() in Python and catch any exception.|Put the Python call $fn() into try and except.|Give Python code that runs $fn() and prints the exception.|Protect the Python call $fn() against errors.",
  "try:\n    $fn()\nexcept Exception as e:\n    print(e)", "# run $fn and print the error\ntry:\n    $fn()\nexcept Exception as e:\n    print(e)|try:\n    $fn()\nexcept Exception as e:\n    print(e)|try:\n    $fn($x)\nexcept ValueError:\n    pass")
C("lambda", "Write a Python lambda that adds $k to $f.|Give a lambda that returns $f plus $k.|Define a Python lambda for $f plus $k.|I need a lambda which adds $k to its argument $f.|Create a small Python lambda: $f plus $k.",
  "lambda $f: $f + $k", "# add $k to $f\nlambda $f: $f + $k|g = lambda $f: $f + $k|$xs.sort(key=lambda $x: $x + $k)")
C("fstring", "Print the text Hello and the variable $f with a Python f-string.|Write a Python f-string that prints Hello and $f.|Use an f-string to print Hello with $f.|Say Hello to the variable $f in Python with an f-string.|Give a Python print with an f-string for Hello and $f.",
  'print(f"Hello {$f}")', '# say hello to $f\nprint(f"Hello {$f}")|print(f"Hello {$f}")|print(f"{$f} and {$h}")|text = f"$x: {$f}"')
C("constant", "Define a Python variable $f with the value $k.|Set the variable $f to $k in Python.|Write Python that stores $k in $f.|Create a Python variable $f equal to $k.|Give the number $k to the Python variable $f.",
  "$f = $k", "$f = $k|# $f is $k\n$f = $k|$f = $k\nprint($f)|$f = $k\n$h = $j")
C("select", "Write SQL to select the column $f from the table $xs.|Get the $f of all $xs with SQL.|Give an SQL query for $f in the table $xs.|List the $f of every row in $xs using SQL.|Select $f from $xs in SQL.",
  "SELECT $f FROM $xs;", "-- the $f of all $xs\nSELECT $f FROM $xs;|SELECT $f FROM $xs;|SELECT $f, $h FROM $xs;|The query SELECT $f FROM $xs; lists the $f of the $xs.")
C("rows", "Write SQL to get all $xs where $f is over $k.|Select the rows of the table $xs with $f greater than $k in SQL.|Give an SQL query for $xs with $f above $k.|Find all $xs in SQL whose $f is more than $k.|List the $xs with a $f over $k using SQL.",
  "SELECT * FROM $xs WHERE $f > $k;", "-- all $xs with $f over $k\nSELECT * FROM $xs WHERE $f > $k;|SELECT * FROM $xs WHERE $f > $k;|SELECT $h FROM $xs WHERE $f > $k;")
C("rowcount", "Write SQL to count the rows of the table $xs.|How many rows are in the SQL table $xs?|Give an SQL query that counts all $xs.|Count the $xs with SQL.|Name the SQL query for the number of rows in $xs.",
  "SELECT COUNT(*) FROM $xs;", "-- how many $xs\nSELECT COUNT(*) FROM $xs;|SELECT COUNT(*) FROM $xs;|SELECT COUNT(*) FROM $xs WHERE $f > $k;")
C("order", "Write SQL to get all $xs ordered by $f.|Sort the SQL table $xs by the column $f.|Give an SQL query for all $xs in the order of $f.|List the rows of $xs by $f using SQL.|Select all $xs sorted by $f in SQL.",
  "SELECT * FROM $xs ORDER BY $f;", "-- all $xs by $f\nSELECT * FROM $xs ORDER BY $f;|SELECT * FROM $xs ORDER BY $f;|SELECT $h FROM $xs ORDER BY $f;")
C("heading", "Write an HTML heading with the text $xs.|Make a heading that says $xs in HTML.|Give the HTML for a main heading $xs.|Create an HTML h1 with the title $xs.|Put the word $xs into an HTML heading.",
  "<h1>$xs</h1>", "<h1>$xs</h1>|<!-- heading $xs -->\n<h1>$xs</h1>|<h1>$xs</h1>\n<p>$f</p>|The heading $xs is <h1>$xs</h1> in HTML.")
C("link", "Write an HTML link to $l.html with the text $f.|Make a link in HTML that says $f and opens $l.html.|Give the HTML for a link to $l.html called $f.|Create an HTML link named $f to the page $l.html.|Link the word $f to $l.html in HTML.",
  '<a href="$l.html">$f</a>', '<a href="$l.html">$f</a>|<!-- link to $l.html -->\n<a href="$l.html">$f</a>|<p>See <a href="$l.html">$f</a>.</p>')
C("htmllist", "Write an HTML list of the items.|Convert the items to an HTML list.|Make an unordered list in HTML.|Rewrite this as an HTML list.|Give the HTML list for these items.",
  "<ul>\n<li>$o</li>\n<li>$q</li>\n</ul>", "<ul>\n<li>$o</li>\n<li>$q</li>\n</ul>|<!-- $o, $q -->\n<ul>\n<li>$o</li>\n<li>$q</li>\n</ul>|$o, $q\n<ul>\n<li>$o</li>\n<li>$q</li>\n</ul>", "$o, $q")
C("css", "Write a CSS rule that makes $tag $col.|Give the CSS for $col text in $tag.|Set the text color of $tag to $col with CSS.|Make the tag $tag $col using CSS.|Color the $tag element $col in CSS.",
  "$tag { color: $col; }", "$tag { color: $col; }|/* $col $tag */\n$tag { color: $col; }|/* $tag */\n$tag { color: $col; }|$tag { margin: 0; }\n$tag { color: $col; }")
C("mkdir", "Write the shell command to make a folder $l.|Create a directory named $l in the shell.|Give the bash command that makes the folder $l.|How do I make a new folder called $l on the command line?|Make a directory $l with a shell command.",
  "mkdir $l", "mkdir $l|# make the folder $l\nmkdir $l|mkdir $l\ncd $l")
C("rm", "Write the shell command to remove the file $l.txt.|Delete $l.txt in the shell.|Give the bash command that deletes the file $l.txt.|How do I remove $l.txt on the command line?|Remove the file $l.txt with a shell command.",
  "rm $l.txt", "rm $l.txt|# remove $l.txt\nrm $l.txt|cat $l.txt\nrm $l.txt|cp $l.txt old.txt\nrm $l.txt")
C("json", "Write a JSON object with $f set to $k.|Give a JSON object where $f is $k.|Create JSON with the key $f and the number $k.|Convert $f = $k to JSON.|Make a JSON object: the key is $f, the value $k.",
  '{"$f": $k}', '{"$f": $k}|$x = {"$f": $k}|// $f is $k\n{"$f": $k}|{"$f": $k, "$h": $j}')
C("log", "Write JavaScript to print $f.|Print the variable $f in JavaScript.|Log $f to the console in JavaScript.|How do I print $f in JavaScript?|Give the JavaScript line that shows $f on the console.",
  "console.log($f);", "console.log($f);|// print $f\nconsole.log($f);|const $f = $k;\nconsole.log($f);")
C("jsfunction", "Write a JavaScript function $fn that returns $f.|Define a function $fn in JavaScript which returns $f.|Create a JavaScript function called $fn that returns its argument $f.|Give a JavaScript function $fn that takes and returns $f.|I need a JavaScript function $fn with the argument $f, returning it.",
  "function $fn($f) {\n  return $f;\n}", "function $fn($f) {\n  return $f;\n}|// $fn returns $f\nfunction $fn($f) {\n  return $f;\n}|function $fn($f) {\n  console.log($f);\n}")
C("tojs", "Convert the Python code to JavaScript.|Rewrite this Python line in JavaScript.|Translate the code from Python to JavaScript.|Write the same in JavaScript.|Give the JavaScript version of this Python line.",
  "console.log($f);", "# Python\nprint($f)\n// JavaScript\nconsole.log($f);|print($f)\nconsole.log($f);|In JavaScript print($f) is console.log($f); instead.", "print($f)")
C("colon", "Fix the Python code.|Add the missing colon to the code.|Find and fix the syntax error.|Correct this Python loop.|Rewrite the code without the error.",
  "for $x in $xs:\n    print($x)", "# wrong\nfor $x in $xs\n    print($x)\n# right\nfor $x in $xs:\n    print($x)|for $x in $xs\n    print($x)\nA colon is missing:\nfor $x in $xs:\n    print($x)", "for $x in $xs\n    print($x)")
C("docstring", "Add a docstring to the Python function.|Write a docstring for this function.|Give the function a docstring.|Rewrite the Python function with a docstring.|Document the function with a docstring.",
  'def $fn($f):\n    """Return $f."""\n    return $f', 'def $fn($f):\n    return $f\n# with a docstring\ndef $fn($f):\n    """Return $f."""\n    return $f|def $fn($f):\n    """Return $f."""\n    return $f', "def $fn($f):\n    return $f")
def explained(d):
    s = code(d)
    return s | dict(zip("eg", map(lambda t: fill(t, s), d.pick("len($xs)~the number of items in|max($xs)~the largest item of|min($xs)~the smallest item of|sum($xs)~the sum of|sorted($xs)~the items in order of|$xs[0]~the first item of|$xs[-1]~the last item of").split("~"))))
C("explain", "Explain the Python expression.|What does this Python code give?|Describe this code in one sentence.|Write in plain words what the code does.|Explain this line of code.",
  "It gives $g $xs.", "$e\nIt gives $g $xs.|# $g $xs\n$e|The code $e gives $g $xs.", "$e", explained)
def snippet(d):
    s = code(d)
    a, b = d.pick("len($xs)~Python|print($f)~Python|for $x in $xs:\n    print($x)~Python|SELECT $f FROM $xs;~SQL|DELETE FROM $xs;~SQL|<h1>$xs</h1>~HTML|<p>$f</p>~HTML|$tag { color: $col; }~CSS|$tag { margin: 0; }~CSS|console.log($f);~JavaScript|const $f = $k;~JavaScript|mkdir $l~shell|rm $l.txt~shell").split("~")
    return s | dict(e=fill(a, s), g=b)
C("which", "Name the language of this code.|Which programming language is this?|In what language is this code written?|Give the language of the snippet.|Tell me the language of the code.",
  "This is $g code.", "$e\nThis is $g code.|This is $g code.\n$e|In $g one writes:\n$e", "$e", snippet)
def typed(d):
    s, more = code(d), "|True~bool|None~NoneType" if d.side == "all" else ""
    a, b = d.pick('"$x"~str|"$o"~str|$k~int|$k.$j~float|[$k, $j]~list|["$x", "$o"]~list|{"$f": $k}~dict|($k, $j)~tuple' + more).split("~")
    return s | dict(e=fill(a, s), g=b)
C("type", "What is the type of the Python value $e?|Name the Python type of $e.|Give the type of $e in Python.|Which Python type has the value $e?|Tell me the type of $e in Python.",
  "$g", "type($e)\n$g|The type of $e is $g.|$f = $e  # $g|isinstance($e, $g)", slots=typed)

def draw(kind, d, pattern):
    """Slots of one example of a kind, and one of the "|" alternatives of a pattern filled with them."""
    slots = people(d) | kind[1](d)
    return slots, fill(d.pick(pattern), slots)

# ---------------------------------------------------------------- the instruction sets
# Read in the prose but not asked: the first because the prose has such questions with answers, the others are too hard.
PROSE_ONLY = ("yesno", "odd", "tool")
# Wordings of requests in the prose and the plainer ones that the sets ask with: code should be seen to be code.
REWORD = """Write in plain words what the code does.|Write what this Python code gives.
Describe this code in one sentence.|Describe this Python code in one sentence.
Rewrite this as an HTML list.|Write an HTML ul list of these items.
Give the HTML list for these items.|Give the HTML code of a list with these items.
Name the language of this code.|Name the programming language of this code.
In what language is this code written?|In what programming language is this code?
Tell me the language of the code.|Is this code Python, SQL, HTML, CSS, JavaScript or shell?
Which programming language is this?|Which programming language is this code?
Begin an email to $n.|Say hello to $n in a letter.
Append the variable $x to the list $ys in Python.|Append $x to the Python list $ys.
Make the tag $tag $col using CSS.|Write the CSS code that makes the text of $tag $col.
Delete $l.txt in the shell.|Delete the file $l.txt with a bash command.
Set the text color of $tag to $col with CSS.|Write a CSS rule for $col text in $tag.
Write the items as a list with bullets.|Put bullets before these things.
How do you write more than one $x?|What do you call more than one $x?
Give a lambda that returns $f plus $k.|Give a Python lambda that returns $f plus $k.
Put the word $xs into an HTML heading.|Write the HTML code for a heading $xs.
Add the numbers in the Python list $xs.|Write Python code for the sum of the list $xs.
Find and fix the syntax error.|Fix the syntax error in this Python code.
Explain this line of code.|Explain this line of Python code.
Write a docstring for this function.|Write a docstring for this Python function.
Give a for loop that prints every $x in $xs.|Give a Python for loop that prints every $x in $xs."""

def reword(asks):
    for line in REWORD.splitlines(): asks = asks.replace(*line.split("|"))
    return asks

def make_data(out, seed, train=4000, val=400, choose=200):
    """Write both sets, one record a line; every kind gets an equal share; no prompt occurs twice. "choose" is drawn
    like "val", after it: settings are chosen on the one, figures published on the other."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, kinds in (("alpaca", GENERAL), ("code", CODE)):
        kinds = [k for k in kinds if k[0] not in PROSE_ONLY]
        prompts = set()
        for side, total in (("train", train), ("val", val), ("choose", choose)):
            rng, records = random.Random(f"{seed} {name} {side}"), []
            for i, kind in enumerate(kinds):
                d, tries, goal = Draw("train" if side == "train" else "val", rng), 0, total * (i + 1) // len(kinds)
                while len(records) < goal and (tries := tries + 1) < 5000:  # what one kind lacks, the next one makes up
                    slots, ask = draw(kind, d, reword(kind[2]))
                    inp, answer = fill(kind[3], slots), fill(kind[4], slots)
                    if (ask, inp) not in prompts:
                        prompts.add((ask, inp))
                        records.append(dict(instruction=ask, input=inp, output=answer, kind=kind[0]))
            assert len(records) == total
            rng.shuffle(records)
            lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
            path = out / "data" / f"{name}.{side}.json"
            path.write_text(f"[\n{lines}\n]\n")
            print(f"{path.name}: {len(records)} records, {len(kinds)} kinds, {path.stat().st_size / 1e6:.2f} MB")

# ---------------------------------------------------------------- the pretraining text
MODULES = ("argparse ast base64 bisect bdb calendar cmd code codecs collections colorsys configparser contextlib copy csv datetime decimal "
           "difflib dis enum filecmp fileinput fnmatch fractions functools getopt glob gzip heapq hmac html imaplib inspect io json keyword "
           "linecache logging mailbox mimetypes numbers operator optparse os pathlib pdb pickle platform pprint profile pstats queue random "
           "reprlib sched secrets shelve shlex shutil smtplib socket sqlite3 statistics string subprocess tarfile tempfile textwrap "
           "threading timeit tokenize trace traceback types typing unittest urllib uuid warnings wave weakref zipfile").split()

def stdlib(limit=1_200_000):
    """Chunks of whole lines, about 800 characters each, from standard library sources."""
    text, chunks = "", [""]
    for m in MODULES:
        spec = importlib.util.find_spec(m)
        if spec and spec.origin and spec.origin.endswith(".py"): text += Path(spec.origin).read_text("utf-8")[:25_000] + "\n"
    for line in text[:limit].splitlines():
        if len(chunks[-1]) > 800: chunks.append("")
        chunks[-1] += line + "\n"
    return chunks

def echo(d):
    """A phrase that is quoted and comes again later: what copying is learned from."""
    w = " ".join(d.word() if d.rng.random() < d.made_up * 2 else d(d.rng.choice((THING, FOOD, PLACE, MANY, FIELD, STATE)))[0] for _ in range(d.rng.randint(1, 5)))
    return fill(d.pick('The sign said "$w". $n read it aloud: "$w".|"$w," said $n. "$w?" asked $m. "Yes, $w."|$w\n$w|$Cw. That was all. $Cw.|# $w\nprint("$w")|'
                       '$n wrote $w on the wall. Later $m found $w there.|s = "$w"\nassert s == "$w"|<p>$w</p>\n<h1>$w</h1>|Say $w, then $w again.'), people(d) | dict(w=w, Cw=cap(w)))

WORDS = sorted({w for t in list(globals().values()) if isinstance(t, Table) for r in t.all for c in r for w in c.split()} | {cap(v) for v, _ in ACT.all})

def drill(d):
    """Random words, twice or three times the same."""
    w = [d.rng.choice(WORDS) if d.rng.random() > d.made_up else d.word() for _ in range(d.rng.randint(4, 24))]
    return d.pick("\n|. |\n\n").join([d.pick(" |, |\n| - ").join(w)] * d.rng.randint(2, 3))

def documents(rng, library, made_up=.2):
    """An endless stream of documents: prose, code, requests heard (never answered), headed notes, drills, library code."""
    d = Draw("all", rng, made_up)
    fact = [k for k in GENERAL if k[3] == ""]
    say = lambda: echo(d) if rng.random() < .08 else draw(k := rng.choice(fact if rng.random() < .7 else GENERAL), d, k[5])[1]
    code = lambda: draw(k := rng.choice(CODE), d, k[5])[1]
    while True:
        d.pool = {} if rng.random() < .6 else None
        u, many = rng.random(), range(rng.randint(1, 8))
        if u < .54: yield d.pick(" | |\n").join(say() for _ in many)
        elif u < .84: yield d.pick("\n|\n\n").join(code() for _ in many)
        elif u < .90:  # requests without their answers, so that the words of requests are known words
            yield "\n".join(fill(d.pick("$n asked: $r|$m said: \"$r\"|- $r|A request: $r"), people(d) | dict(r=draw(k := rng.choice(GENERAL + CODE), d, k[2])[1])) for _ in many)
        elif u < .93: yield "\n\n".join("### " + d.pick("Instruction|Input|Response") + ":\n" + d.rng.choice((say, code))() for _ in range(rng.randint(1, 3)))
        elif u < .975: yield drill(d)
        else: yield rng.choice(library)

# ---------------------------------------------------------------- the backbone
J, K, LETTERS = "\ue000", "\ue001", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
join_marks = lambda text: re.sub(r"(?<!([^\W\d_]| ))(?=[A-Za-z])", J + " ", text)

def make_tokenizer(docs):
    """Byte-level BPE with 3,584 pieces in which a word has the same piece after a space and elsewhere.
    A word without a space before it, as in "len(prices)", is written as a joining mark J and the spaced word; the decoder
    takes "J " out again (a J of the text itself is doubled up with K, so any text round-trips). J sticks to what precedes
    it: "(J" or a line start is one piece. So copying a word from a sentence into code is copying a piece, which a model
    this small can learn. The three prompt markers are one piece each, digits are single."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    pieces = r"\n*### (?:Instruction|Input|Response):\nJ?|\n+ *(?= \p{L})|\n+ *J?| ?\p{L}+| ?\p{N}J?| ?[^\s\p{L}\p{N}J]+J?|J|\s+(?!\S)|\s+".replace("J", J)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(J + " ", ""), decoders.Replace(J + K, J)])
    special = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<pad>")]
    trainer = trainers.BpeTrainer(vocab_size=3584, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    markers = ["### Instruction:\nx\n\n### Input:\n5\n\n### Response:\n", "### Instruction:\n5\n\n### Input:\nx\n\n### Response:\nx"] * 20000
    tok.train_from_iterator([join_marks(t) for t in docs + markers] + [" " + w for w in WORDS] * 400, trainer)
    # An empty match cannot be replaced there, hence one rule for each letter; join_marks is the same in one step.
    tok.normalizer = normalizers.Sequence([normalizers.Replace(J, J + K)] + [normalizers.Replace(Regex(rf"(?<![ \p{{L}}]){c}"), f"{J} {c}") for c in LETTERS])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512, clean_up_tokenization_spaces=False)

def start_copying(model, seed):
    """Start values that let the attention copy from the first step on, instead of after a long search for how to.

    Dimension 0 of all embeddings is a constant. Layer 0, head 0: attends to the previous token, by RoPE alone (queries
    turned back by one position), and writes a projection P of it to a separate subspace S. Layer 1, head 0: attends to
    tokens whose S agrees with P of the present token, in the slow RoPE dimensions: what followed when this token came
    before. All values and outputs are transposes of each other: what is attended to is copied. The final norm starts
    at 4, so that logits can be large early. Everything is trained further."""
    import torch
    g, d, hd, slow = torch.Generator().manual_seed(seed), 192, 32, [*range(8, 16), *range(24, 32)]
    basis = lambda n: torch.nn.functional.pad(torch.linalg.qr(torch.randn(d - 1, n, generator=g))[0].T, (1, 0))
    turn, P, S = 10000 ** (-torch.arange(8) / 16.), basis(16), basis(16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = .1
        model.model.norm.weight.fill_(4.)
        for i, layer in enumerate(model.model.layers):
            q, k, v, o = (getattr(layer.self_attn, n + "_proj").weight for n in "qkvo")
            v.copy_(basis(64))
            o.copy_(v.view(2, 1, hd, d).expand(2, 3, hd, d).reshape(d, d).T * .03)
            if i < 2: q[:hd], k[:hd] = 0, 0
            if i == 0:
                k[:8, 0], q[:8, 0], q[16:24, 0] = 1.2, 1.2 * torch.cos(turn), -1.2 * torch.sin(turn)
                v[:16], o[:, :hd] = P, 0
                o[:, :16] = S.T * .06
            if i == 1:
                q[slow], k[slow] = P * 1.7, S * 1.7
                o[:, :hd] *= 8

def new_model(tok, seed):
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(tok), hidden_size=192, num_hidden_layers=4, intermediate_size=288, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=True, sliding_window=None, max_position_embeddings=512, rope_theta=10000.0,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    # Start " Word" near " word", so that copying into the other case is easy to learn.
    names = tok.convert_ids_to_tokens(range(len(tok)))
    with torch.no_grad():
        for i, n in enumerate(names):
            low = "Ġ" + n[1:].lower()
            if n[0] == "Ġ" and n != low and low in names:
                model.model.embed_tokens.weight[i].mul_(.6).add_(model.model.embed_tokens.weight[names.index(low)], alpha=.8)
    start_copying(model, seed)
    return model

def blocks(stream, tok, seed, batch, length, drills):
    """Token ids [batch, length], without end. Copying first: in `drills` of them, random pieces come twice. Then fresh
    documents all the time: nothing is read twice but the library."""
    import torch
    from tokenizers import Tokenizer
    plain = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    plain.normalizer, plain.post_processor = None, tok.backend_tokenizer.post_processor
    rng, pool = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(drills):
        n = int(rng.choice((4, 8, 16, 32)))
        yield torch.from_numpy(rng.integers(3, len(tok), (batch, length // n // 2, 1, n)).repeat(2, axis=2).reshape(batch, length))
    while True:
        if len(pool) < batch * length:
            texts = [next(stream) for _ in range(20_000)]
            ids = plain.encode_batch([join_marks(t) for t in texts])
            flat = np.concatenate([np.array(e.ids + [tok.eos_token_id]) for e in ids])
            flat = flat[: len(flat) // length * length].reshape(-1, length)
            pool = flat[rng.permutation(len(flat))].reshape(-1)
        yield torch.from_numpy(pool[: batch * length].reshape(batch, length))
        pool = pool[batch * length:]

def make_backbone(out, seed, steps, minutes, batch=8, length=256, peak=2.5e-3, drills=120):
    import torch
    from tqdm import tqdm
    out = out / "tiny"
    out.mkdir(parents=True, exist_ok=True)
    rng, library = random.Random(f"{seed} text"), stdlib()
    stream = documents(rng, library)
    tok = make_tokenizer([t for t, _ in zip(documents(random.Random(seed), library, 0), range(25_000))])
    model = new_model(tok, seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {batch} x {length} tokens")
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=.1), dict(params=rest, weight_decay=0.)], lr=peak, betas=(.9, .95), fused=True)
    log, mean, began = [], [], time.time()
    bar = tqdm(range(steps), mininterval=10, disable=None)  # not where there is no terminal
    for step, x in zip(bar, blocks(stream, tok, seed, batch, length, drills)):
        # With --minutes the schedule follows the clock, which no second run repeats exactly; with --steps it is fixed.
        done = (time.time() - began) / 60 / minutes if minutes else step / steps
        if done >= 1: break
        for g in opt.param_groups: g["lr"] = peak * min(1, (step + 1) / 150) * (.1 + .45 * (1 + math.cos(math.pi * done)))
        logits = model(x).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        mean.append(loss.item())
        if (step + 1) % 100 == 0:
            log.append(f"{step + 1} {np.mean(mean):.4f}")
            bar.set_postfix(loss=f"{np.mean(mean):.3f}")
            mean = []
            (out / "pretrain.log").write_text("step loss\n" + "\n".join(log) + "\n")
    model.half().save_pretrained(out)
    tok.save_pretrained(out)
    for text in ("### Instruction:\nNaïve café?\n\n### Response:\n", "def f(x):\n    return  x\t# 漢字 🙂\r\n", " a  b ", "e\u0301\ue000 x\ue000\ue001y\ue000"):
        assert tok.decode(tok(text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False) == text
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()[:16]
    print(f"backbone in {(time.time() - began) / 60:.1f} min, sha256 {digest}, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "assets", help="folder to write to [assets]")
    p.add_argument("--data-only", action="store_true", help="only the instruction sets")
    p.add_argument("--steps", type=int, default=2700, help="pretraining steps of 2,048 tokens [2700]")
    p.add_argument("--minutes", type=float, default=0, help="stop by the clock instead [0: do not]")
    p.add_argument("--threads", type=int, default=2, help="of torch [2]")
    p.add_argument("--seed", type=int, default=1, help="of data, text and weights [1]")
    a = p.parse_args()
    make_data(a.out, a.seed)
    if a.data_only: return
    import torch
    torch.set_num_threads(a.threads)
    make_backbone(a.out, a.seed, 10**6 if a.minutes else a.steps, a.minutes)

if __name__ == "__main__":
    main()
