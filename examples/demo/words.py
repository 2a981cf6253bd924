"""The words that the demo's tasks are made of: plain data, every noun with a regular plural."""


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


NOUNS = words(
    """
    account acid acorn acre actor address adult agency airport alarm album alley almond altar anchor angel
    angle animal ankle answer ant antenna apple apron arch archer arena arm armchair army arrow artist ash
    atlas atom attic aunt author avenue award axle baby badge badger bag baker bakery balcony ball balloon
    banana band bank banner bar barber barn baron barrel base basin basket bat bath battery bay beach bead
    beak beam bean bear beard beast beaver bed bee beetle bell belt bench berry bike bird biscuit blade
    blanket blaze blossom boat body bolt bone bonnet book boot border boss bottle bow bowl box boxer boy
    bracket brain branch brass bread breeze brick bride bridge broom brother brush bubble bucket buckle bud
    bug builder bunch bundle bunny burger bus bush butcher butter butterfly button cabin cabinet cable cactus
    cake camel camera camp canal canary candle candy canoe canvas cap cape captain car caravan card career
    carpet carrot cart castle cat cave ceiling cell cellar center century chain chair chalk chapel chapter
    charm chart cheese cherry chest chicken chimney chin church cinema circle circus citizen city class clay
    clerk clinic cloak clock closet cloud clown club clue coach coast coat cobra coffee coin collar college
    colony color column comb comet compass cookie copper copy coral cord cork corner cottage cotton couch
    country county couple course court cousin cow coyote crab cradle crane crash crate crater crayon cream
    creek crew cricket crop cross crow crowd crown crumb crust crystal cub cube cup cupboard cure curl current
    curtain curve cushion daisy dam dancer dance date daughter dawn day deck desert desk dessert dial diamond
    diary dinner dish ditch diver doctor dog doll dollar dolphin donkey door dragon drawer dream dress drill
    drink driver drop drum duck duke dust duty dwelling eagle ear earth edge editor eel egg elbow elephant elm
    emperor empire engine entry error essay estate evening event exam exit expert eye fable face factory fair
    fairy falcon family fan farm farmer father faucet feast feather fee fence fern ferry festival fever fiddle
    field fig finch finger fire fish flag flake flame flash flask fleet flock flood floor flower flute fly fog
    fork fort fossil fountain fox frame friend frog fruit funnel gallery game garage garden garlic gate
    gazelle gem general ghost giant gift ginger giraffe girl glacier glass globe glove glue goal goat gorilla
    gown grape graph grass grave grill grip grocery group guard guess guest guide guitar gulf gym habit hail
    hall hammer hammock hand handle harbor harp hat hatch hawk heart heater hedge heel helmet hen herb hermit
    heron hill hinge hobby hole holiday honey hook horn horse hospital host hotel hour hunter hut ice idea
    inch infant ink inn insect island ivy jacket jaguar jail jam jar jaw jelly jet jewel job joke journal
    journey judge jug juice jungle jury kettle key kid king kingdom kiss kitchen kite kitten knee knight knot
    koala label lace ladder lady lake lamb lamp land lane lantern lap laptop larch latch lawn lawyer leader
    league leg legend lemon lens leopard lesson letter lever library lily lime line lion lip list lizard llama
    lobby lobster lock locket lodge log lunch machine magnet maid mail manager mango mantle map maple marble
    march market marsh mask mast master mat match maze meadow meal medal melody melon member memory menu
    mermaid message meteor method mile mill miner mint minute mirror mission mist mitten model moment monkey
    monster month moon morning moth mother motor mountain mouth movie mud muffin mug mule muscle museum
    mystery nail name nation neck necklace needle nephew nest net niece night noise noon nose note novel
    number nurse nut oak oar ocean office officer olive onion opera orange orchard orchid organ orphan otter
    oven owl owner oyster pack paddle page pail palace palm pan panda panel panther paper parade parcel parent
    park parrot party pass pastry patch path patrol pattern peach peak peanut pear pearl pebble pedal pelican
    pen pencil penny pepper perch person petal phone picnic picture pie pier pig pigeon pill pillow pilot pin
    pine pipe pirate pistol pitch pizza place plain plan plane planet plant plate plaza plow plum pocket poem
    poet point pole pond pony pool poppy porch port possum poster pot pottery prairie present priest prince
    prison prize problem pub pump pumpkin pupil puppet puppy purse puzzle pyramid quail quarry queen question
    quill quilt rabbit race radish raft rain ranch range rat raven razor recipe record reef region relay rent
    report reptile rescue resort result ribbon rice rider ridge rifle ring river road robin rock rocket rod
    roof room root rope rose route row ruby rug ruler runner saddle sail sailor salad sandal satchel sauce
    saucer saw scale scar school scout screen screw sea seal season seat secret seed senator servant shadow
    shark shed shell shepherd shield ship shirt shoe shop shore shovel shower shrub shutter sign signal sink
    siren sister skate sketch ski skill skirt skull sky slave sleeve slice slope smile smith snail snake soap
    sock soda sofa soldier song sound soup spark sparrow speaker spear spider spoon sponge spring spy square
    squirrel stable stage stair stall stamp star state station statue steam stem step stew stick stitch stone
    stool store storm story stove stranger straw stream street string student studio sugar suit summer sun
    surgeon swamp swan sweater switch sword symbol table tablet tail tailor tank tap target task tavern taxi
    teacher team tear temple tent test theater theory thorn thread throat throne thumb ticket tide tiger tile
    timber tin toad toast toe tool torch tortoise tour towel tower town toy track tractor trail train tray
    treaty tree trench trial tribe trick trophy truck trumpet trunk truth tub tube tulip tunnel turkey turnip
    turtle tutor twig uncle valley van vase vault verse vessel victory video view village vine violet violin
    virus visitor voice voyage wagon waiter wall walnut walrus warrior wasp watch wave weapon weasel web
    wedding weed week well whale wheel whisper whistle widow window wing winner winter wire wish witch wizard
    wonder word worker world worm wound wreck wrench writer yacht yard year zebra zipper zone
    """
)

ADJECTIVES = words(
    """
    amber ancient blue brave bright broad calm clean clever cold cool curious dark deep distant dry eager
    early empty fast final first fresh gentle giant golden grand green happy heavy hidden high hollow huge icy
    idle kind last late light little lively long loud low lucky magic modern narrow new noble odd old open
    pale plain polite proud quick quiet rapid rare ready red rich ripe rough round royal rusty sharp short
    silent silver simple sleepy slow small smooth soft solid stable steady still strange strong sunny sweet
    swift tall tame tidy tiny upper vast warm wide wild wise wooden yellow young
    """
)

GOOD = words(
    """
    amazing beautiful brilliant charming cheerful delicious delightful excellent exciting fantastic fine
    friendly generous glorious good great helpful impressive lovely marvelous nice outstanding perfect
    pleasant splendid superb terrific thoughtful wonderful
    """
)

BAD = words(
    """
    annoying appalling awful bad boring broken clumsy cruel dirty disappointing disgusting dreadful dull
    filthy frustrating ghastly gloomy horrible lousy miserable nasty painful poor rotten rude sad terrible
    ugly useless
    """
)
